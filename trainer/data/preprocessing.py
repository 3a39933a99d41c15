"""Crop and resize as TensorFlow's ResNet preprocessing, in numpy and torch.

The papers' code (data/imagenet.py of Bop and Bop2ndOrder, larq_zoo/training/data.py) crops with
tf.image.sample_distorted_bounding_box, evaluates on the central 224/256 of the short side, and
resizes with tf.compat.v1.image.resize_bicubic. These are specified only by TensorFlow's
sample_distorted_bounding_box_op.cc and resize_bicubic_op.cc, so both are followed line by line
here, in the float32 that they compute in. Windows use the four basic operations, sqrt and rounding:
the same bits on every machine, as in sampler.py.
"""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitfleet.trainer.data import sampler
from bitfleet.trainer.data.sampler import Ints, Windows

_ATTEMPTS = 10
_AREA_RANGE = (np.float32(0.08), np.float32(1.0))
_ASPECT_RANGE = (np.float32(3 / 4), np.float32(4 / 3))  # width / height
_MIN_COVERED = np.float32(0.1)  # of the image: windows of 8 to 10 % are drawn, then refused
_CROP_PADDING = 32
_WIDTH_EPSILON = float(np.float32(1e-7))

TABLE_SIZE = 1024  # weights are looked up for a position rounded to 1/1024 pixel
# Images resized at once. It bounds the memory, on a CPU to what its caches hold; a GPU needs work
# for each launch.
_CPU_CHUNK, _GPU_CHUNK = 4, 32

Float32s = npt.NDArray[np.float32]


def official_central_windows(heights: Ints, widths: Ints, size: int) -> Windows:
    """Return the square windows, int32, of the official evaluation.

    size / (size + 32) of the short side, truncated. An odd remainder goes to the top and the left.
    A window without a pixel, where the official code fails, becomes one pixel.
    """
    short = np.minimum(heights, widths).astype(np.float32)
    side = np.maximum((np.float32(size / (size + _CROP_PADDING)) * short).astype(np.int64), 1)
    return sampler.windows_at((heights - side + 1) // 2, (widths - side + 1) // 2, side, side)


def official_random_windows(seed: int, epoch: int, samples: Ints, heights: Ints, widths: Ints, size: int) -> Windows:
    """Return windows, int32, distributed as the official code's training crops.

    Ten attempts of sample_distorted_bounding_box with the whole image as the object. The aspect
    ratio w/h is uniform in [3/4, 4/3], the height uniform between the least and the greatest that
    keep 8-100 % of the area; at least 10 % of the image must be covered. If no attempt fits, or the
    window is the whole image, the evaluation window is taken. As in TensorFlow, a window lower than
    the image never touches its bottom, and a narrower one never its right edge.

    Args:
        seed: Seed of the run.
        epoch: From 0.
        samples: Indices of the images [N].
        heights: Pixels [N].
        widths: Pixels [N].
        size: Height and width of the output, pixels; sets the evaluation window.
    """
    draws = sampler.uniforms(seed, epoch, sampler.OFFICIAL_CROP, samples, 4 * _ATTEMPTS)
    aspect_draw, height_draw, y_draw, x_draw = np.split(draws, 4, axis=1)
    low, high = _ASPECT_RANGE
    fraction = (np.floor(aspect_draw * 2**23) / 2**23).astype(np.float32)  # TensorFlow's RandFloat has 23 bits
    height, width, fits = _crop_sizes(fraction * (high - low) + low, height_draw, heights[:, None], widths[:, None])
    attempt, row = fits.argmax(axis=1), np.arange(len(samples))  # the first that fits
    height, width = height[row, attempt], width[row, attempt]
    y = np.floor(y_draw[row, attempt] * (heights - height)).astype(np.int64)
    x = np.floor(x_draw[row, attempt] * (widths - width)).astype(np.int64)
    drawn = fits[row, attempt] & ((height < heights) | (width < widths))
    windows, central = sampler.windows_at(y, x, height, width), official_central_windows(heights, widths, size)
    starts, ends = (np.where(drawn[:, None], *pair) for pair in zip(windows, central, strict=True))
    return Windows(starts, ends)


def _crop_sizes(
    aspect: Float32s, height_draw: sampler.Floats, heights: Ints, widths: Ints
) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Apply GenerateRandomCrop and SatisfiesOverlapConstraints of TensorFlow's op to every attempt.

    Args:
        aspect: Width / height [N, attempts].
        height_draw: Picks the height from the allowed ones, in [0, 1) [N, attempts].
        heights: Pixels of the images [N, 1].
        widths: Pixels of the images [N, 1].

    Returns:
        Height and width [N, attempts], and whether the attempt succeeded.
    """
    image_area = (heights * widths).astype(np.float32)
    least_area, most_area = (area * widths.astype(np.float32) * heights.astype(np.float32) for area in _AREA_RANGE)
    least = np.rint(np.sqrt(least_area / aspect)).astype(np.int64)
    most = np.rint(np.sqrt(most_area / aspect)).astype(np.int64)
    narrowed = np.floor((widths + 0.5 - _WIDTH_EPSILON) / aspect.astype(np.float64)).astype(np.int64)
    narrowed -= _width(narrowed, aspect) > widths
    most = np.where(_width(most, aspect) > widths, narrowed, most)
    most = np.minimum(most, heights)
    least = np.minimum(least, most)

    height = least + np.floor(height_draw * (most - least + 1)).astype(np.int64)
    height += _area(height, aspect) < least_area  # one pixel of slack against rounding, first upwards
    height -= _area(height, aspect) > most_area
    width, area = _width(height, aspect), _area(height, aspect)
    fits = (area >= least_area) & (area <= most_area) & (height <= heights) & (width <= widths)
    return height, width, fits & (height > 0) & (width > 0) & (area / image_area >= _MIN_COVERED)


def _width(height: Ints, aspect: Float32s) -> Ints:
    width: Ints = np.rint(height.astype(np.float32) * aspect).astype(np.int64)
    return width


def _area(height: Ints, aspect: Float32s) -> Float32s:
    return (height * _width(height, aspect)).astype(np.float32)


def resize_windows(windows: Sequence[Tensor], flips: npt.NDArray[np.int32], size: int) -> Tensor:
    """Resize decoded windows, then mirror some, in the order of the official code.

    Args:
        windows: uint8 [H, W, 3] each, on one device; at least one.
        flips: 1 to mirror left to right [N].
        size: Height and width of the output, pixels.

    Returns:
        float32 [N, size, size, 3], not clipped to 0..255.
    """
    device = windows[0].device
    resized = []
    chunk = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK  # padded together: one huge image must not inflate all
    for first in range(0, len(windows), chunk):
        part = windows[first : first + chunk]
        sides = torch.tensor([window.shape[:2] for window in part]).to(device, non_blocking=True)
        height, width = (max(window.shape[axis] for window in part) for axis in (0, 1))
        if len(part) == 1:
            padded = part[0].contiguous()[None]
        else:
            padded = torch.zeros((len(part), height, width, 3), dtype=torch.uint8, device=device)
            for image, window in zip(padded, part, strict=True):
                image[: window.shape[0], : window.shape[1]] = window
        resized.append(resize_bicubic_v1(padded, sides[:, 0], sides[:, 1], size))
    images = torch.cat(resized)
    mirrored = torch.from_numpy(flips.astype(np.bool_)).to(device, non_blocking=True)[:, None, None, None]
    return torch.where(mirrored, images.flip(2), images)


def window_table(shapes: Sequence[Sequence[int]], flips: npt.NDArray[np.int32]) -> Tensor:
    """Return the start, height, width and flip of windows that are stored one after the other.

    Args:
        shapes: (height, width, 3) of each window.
        flips: 1 to mirror left to right [N].

    Returns:
        int64 [N, 4], as bicubic_kernel.py takes it.
    """
    sides = np.array([shape[:2] for shape in shapes], np.int64).reshape(-1, 2)
    num_bytes = 3 * sides.prod(axis=1)
    assert not num_bytes.size or num_bytes.max() < 2**31, "the kernel counts the bytes of a window in int32"
    return torch.from_numpy(np.column_stack([np.cumsum(num_bytes) - num_bytes, sides, flips.astype(np.int64)]))


def resize_bicubic_v1(images: Tensor, heights: Tensor, widths: Tensor, size: int) -> Tensor:
    """Resize as tf.compat.v1.image.resize_bicubic(image, [size, size]) does, to the same bits.

    Neither align_corners nor half_pixel_centers: output pixel i lies at i * side / size of the
    input. Cubic convolution with a = -0.75 over 4 x 4 pixels, the border repeated, without
    antialiasing; the result is not clipped and can leave 0..255 by 45 % of that range. Nothing here
    waits for a GPU.

    Args:
        images: uint8 [N, H, W, 3]; image i is images[i, :heights[i], :widths[i]], the rest is
            ignored.
        heights: int64 [N], 1..H, on the device of the images.
        widths: int64 [N], 1..W, on the device of the images.
        size: Height and width of the output, pixels.

    Returns:
        float32 [N, size, size, 3].
    """
    assert images.dtype is torch.uint8
    count, height, width, _ = images.shape
    rows = images.reshape(count * height, width * 3)
    row_indices, row_weights = _taps(heights, size)
    row_indices += torch.arange(count, device=images.device)[:, None] * height
    column_indices, column_weights = _taps(widths, size)
    column_indices = (column_indices[..., None] * 3 + torch.arange(3, device=images.device)).flatten(2)
    column_weights = column_weights[..., None].expand(4, count, size, 3).flatten(2)
    resized = torch.empty(count, size, size * 3, device=images.device)
    num_chunks = -(-count // (_CPU_CHUNK if images.device.type == "cpu" else _GPU_CHUNK))
    parts = (row_indices, row_weights, column_indices, column_weights)
    for first in range(num_chunks):
        chunk = slice(first * count // num_chunks, (first + 1) * count // num_chunks)
        _resize_into(resized[chunk], rows, *(part[:, chunk] for part in parts))
    return resized.view(count, size, size, 3)


def _resize_into(
    resized: Tensor,
    rows: Tensor,
    row_indices: Tensor,
    row_weights: Tensor,
    column_indices: Tensor,
    column_weights: Tensor,
) -> None:
    """Fill `resized`, float32 [n, size, size * 3], from `rows`, uint8 [N * H, W * 3].

    The last bit depends on TensorFlow's order: down the columns first, the four taps added one by
    one. Rows have indices and weights [4, n, size], values within a row [4, n, size * 3].
    """
    count, size, _ = resized.shape
    lines = rows.index_select(0, row_indices[0].flatten()) * row_weights[0].reshape(count * size, 1)
    for index, weight in zip(row_indices[1:], row_weights[1:], strict=True):
        lines += rows.index_select(0, index.flatten()) * weight.reshape(count * size, 1)
    lines = lines.view(count, size, rows.shape[1])
    column_indices = column_indices[:, :, None].expand(4, count, size, size * 3)
    torch.mul(lines.gather(2, column_indices[0]), column_weights[0, :, None], out=resized)
    for index, weight in zip(column_indices[1:], column_weights[1:], strict=True):
        resized += lines.gather(2, index).mul_(weight[:, None])


def _taps(sides: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return indices, int64 [4, N, size], and weights, float32, of the four taps."""
    # Divided by a tensor: by a number, torch on a GPU multiplies with its reciprocal, which rounds
    # differently.
    scales = sides.to(torch.float32) / torch.full_like(sides, size, dtype=torch.float32)
    positions = torch.arange(size, device=sides.device, dtype=torch.float32) * scales[:, None]
    first = positions.floor()
    offsets = ((positions - first) * TABLE_SIZE).round_().to(torch.int64)
    table = weight_table(sides.device)
    weights = torch.stack(
        [table[offsets + TABLE_SIZE], table[offsets], table[TABLE_SIZE - offsets], table[2 * TABLE_SIZE - offsets]]
    )
    steps = torch.arange(-1, 3, device=sides.device)[:, None, None]
    indices = torch.minimum((first.to(torch.int64) + steps).clamp_(min=0), sides[:, None] - 1)
    return indices, weights


@functools.cache
def weight_table(device: torch.device) -> Tensor:
    """Return the weight of a pixel at each distance 0, 1/1024, ... 2, float32 [2049]."""
    # In float64 the polynomials are exact. Cached, because making one on a GPU waits for a copy.
    # Outside inference mode, since training uses it too.
    a, near, far = -0.75, np.arange(TABLE_SIZE) / TABLE_SIZE, 1 + np.arange(TABLE_SIZE + 1) / TABLE_SIZE
    weights = [((a + 2) * near - (a + 3)) * near * near + 1, ((a * far - 5 * a) * far + 8 * a) * far - 4 * a]
    with torch.inference_mode(False):
        return torch.from_numpy(np.concatenate(weights).astype(np.float32)).to(device)
