"""The official preprocessing against TensorFlow itself.

tests/golden/official_*.npz were recorded with tensorflow-cpu 2.21.0 on x86-64:
tf.compat.v1.image.resize_bicubic(image, [size, size]) of recipe.ints(f"official/{h}x{w}", h * w *
3, 0, 255), of size 224 every 16th row; single windows of tf.raw_ops.SampleDistortedBoundingBoxV2
with their seeds; quantiles (0.05, 0.1, ... 0.95) of 20,000 windows of
tf.image.sample_distorted_bounding_box that are not the whole image; the window of
_center_crop(image, 224) in larq-zoo 2.4.0.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bitfleet.trainer.data import sampler
from bitfleet.trainer.data.preprocessing import (
    official_central_windows,
    official_random_windows,
    resize_bicubic_v1,
    window_table,
)
from tests.golden import recipe
from tests.golden.tensorflow_crop import SimplePhilox, sample

GOLDEN = Path(__file__).parents[3] / "golden"
RESIZED = dict(np.load(GOLDEN / "official_resize.npz"))
WINDOWS = dict(np.load(GOLDEN / "official_windows.npz"))


def recorded_image(height: int, width: int) -> torch.Tensor:
    pixels = recipe.ints(f"official/{height}x{width}", height * width * 3, 0, 255)
    return torch.from_numpy(pixels.reshape(height, width, 3).astype(np.uint8))


def padded(images: list[torch.Tensor], value: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The images in one batch with `value` around them, their heights and widths."""
    heights, widths = (torch.tensor([image.shape[axis] for image in images]) for axis in (0, 1))
    batch = torch.full((len(images), int(heights.max()), int(widths.max()), 3), value, dtype=torch.uint8)
    for index, image in enumerate(images):
        batch[index, : image.shape[0], : image.shape[1]] = image
    return batch, heights, widths


def rows(windows: sampler.Windows) -> np.ndarray:
    """(y, x, height, width) of every window, [N, 4]."""
    return np.concatenate([windows.starts, windows.ends - windows.starts], axis=1)


@pytest.mark.parametrize("name", RESIZED)
def test_resize_gives_the_bits_of_tensorflow(name: str) -> None:
    height, width, size = map(int, re.findall(r"\d+", name))
    resized = resize_bicubic_v1(*padded([recorded_image(height, width)], 0), size)
    assert resized.dtype is torch.float32
    assert resized.shape == (1, size, size, 3)
    np.testing.assert_array_equal(resized[0, :: 16 if size == 224 else 1].numpy(), RESIZED[name])


def test_resize_of_a_batch_is_that_of_each_image_whatever_lies_around_it() -> None:
    names = [name for name in RESIZED if name.endswith("_to_24")]
    images = [recorded_image(*map(int, re.findall(r"\d+", name)[:2])) for name in names]
    for value in (0, 255):
        resized = resize_bicubic_v1(*padded(images, value), 24)
        np.testing.assert_array_equal(resized.numpy(), np.stack([RESIZED[name] for name in names]))


def test_resize_takes_a_batch_without_images() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert resize_bicubic_v1(torch.empty(0, 5, 7, 3, dtype=torch.uint8), none, none, 24).shape == (0, 24, 24, 3)


def test_resize_stays_on_the_device_and_looks_at_no_value_there() -> None:
    """Tensors of the device meta have no values, and mix with those of no other device."""
    batch, heights, widths = (part.to("meta") for part in padded([recorded_image(17, 23)] * 5, 0))
    resized = resize_bicubic_v1(batch, heights, widths, 24)
    assert resized.is_meta
    assert resized.shape == (5, 24, 24, 3)


def test_resize_works_in_training_after_inference_mode() -> None:
    image = padded([recorded_image(17, 23)], 0)
    with torch.inference_mode():
        resize_bicubic_v1(*image, 24)
    weight = torch.ones(3, requires_grad=True)
    (resize_bicubic_v1(*image, 24) * weight).sum().backward()
    assert weight.grad is not None


def test_facts_of_windows_in_one_buffer() -> None:
    facts = window_table([[2, 3, 3], [1, 1, 3], [4, 5, 3]], np.array([0, 1, 0], np.int32))
    assert facts.tolist() == [[0, 2, 3, 0], [18, 1, 1, 1], [21, 4, 5, 0]]
    assert facts.dtype is torch.int64


def test_central_windows_are_those_of_the_official_code() -> None:
    heights, widths, y, x, *crop = WINDOWS["central"].T
    assert set(np.minimum(heights, widths)) == set(range(1, 601))
    valid = crop[0] > 0  # TensorFlow fails where a side of 1 leaves no pixel
    expected = np.stack([y, x, *crop], axis=1)
    ours = rows(official_central_windows(heights.astype(np.int64), widths.astype(np.int64), 224))
    np.testing.assert_array_equal(ours[valid], expected[valid])
    assert (ours[~valid, 2:] == 1).all()
    assert (~valid).sum() == 1


def test_the_scalar_crop_is_tensorflow_s() -> None:
    for size, seeds, window in zip(WINDOWS["sizes"], WINDOWS["seeds"], WINDOWS["windows"], strict=True):
        assert sample(*size.tolist(), SimplePhilox(*seeds.tolist())) == tuple(window)


class SampleDraws:
    """The numbers that official_random_windows draws for one sample, handed out as the scalar code
    asks for them."""

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        draws = sampler.uniforms(seed, epoch, sampler.OFFICIAL_CROP, np.array([index]), 40).reshape(4, 10)
        self._fractions, self._indices = draws[0], dict(zip(("height", "y", "x"), draws[1:], strict=True))
        self._attempt = -1

    def fraction(self) -> np.float32:
        self._attempt += 1
        return np.float32(np.floor(self._fractions[self._attempt] * 2**23) / 2**23)

    def below(self, limit: int, purpose: str) -> int:
        return int(self._indices[purpose][self._attempt] * limit)


def test_random_windows_are_the_scalar_crop_or_else_the_central_one() -> None:
    rng = np.random.default_rng(0)
    heights, widths = np.concatenate([rng.integers(1, most, (250, 2)) for most in (6, 25, 120, 600, 3000)]).T
    windows = rows(official_random_windows(3, 5, np.arange(len(heights)), heights, widths, 224))
    central = rows(official_central_windows(heights, widths, 224))
    num_central = 0
    for index, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        expected = sample(height, width, SampleDraws(3, 5, index))
        if expected[2:] == (height, width):
            expected, num_central = tuple(central[index]), num_central + 1
        assert tuple(windows[index]) == expected
    assert 50 < num_central < 400


def test_random_windows_are_distributed_as_in_tensorflow() -> None:
    count = 20_000
    for (height, width), expected in zip(WINDOWS["quantile_sizes"], WINDOWS["quantiles"], strict=True):
        windows = official_random_windows(0, 0, np.arange(count), np.full(count, height), np.full(count, width), 224)
        y, x, h, w = rows(windows).T
        assert (windows.starts >= 0).all()
        assert (windows.ends < [height, width])[h < height, 0].all()  # TensorFlow never draws the last offset
        ours = (h * w / (height * width), w / h, y / height, x / width)
        # Sampling error of a quantile of 20,000 draws is about 0.003 on these scales, twice; a
        # pixel of 64 is 0.016.
        np.testing.assert_allclose(
            [np.quantile(part, np.linspace(0.05, 0.95, 19)) for part in ours], expected, atol=0.018
        )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5000), (5000, 3), (1, 11)])
def test_random_windows_fall_back_to_the_central_one(height: int, width: int) -> None:
    sizes = np.full(8, height), np.full(8, width)
    windows = official_random_windows(0, 0, np.arange(8), *sizes, 224)
    np.testing.assert_array_equal(rows(windows), rows(official_central_windows(*sizes, 224)))
    assert (windows.ends > windows.starts).all()
    assert windows.starts.dtype == windows.ends.dtype == np.int32


def test_random_windows_do_not_depend_on_the_batch() -> None:
    shuffled = np.random.default_rng(0).permutation(50)
    whole = rows(official_random_windows(1, 2, np.arange(50), np.full(50, 300), np.full(50, 400), 224))
    part = rows(official_random_windows(1, 2, shuffled[:20], np.full(20, 300), np.full(20, 400), 224))
    np.testing.assert_array_equal(part, whole[shuffled[:20]])
    other_epoch = rows(official_random_windows(1, 3, np.arange(50), np.full(50, 300), np.full(50, 400), 224))
    assert (other_epoch != whole).any(axis=1).all()


def test_random_windows_are_those_that_checkpoints_were_written_with() -> None:
    """A change here breaks the exact resume of every run that exists: it is a decision, not a
    refactoring."""
    samples = np.arange(64)
    windows = official_random_windows(2**64 - 1, 1, samples, samples % 7 * 50 + 20, samples % 5 * 70 + 20, 224)
    digest = hashlib.sha256(windows.starts.astype("<i4").tobytes() + windows.ends.astype("<i4").tobytes())
    assert digest.hexdigest() == "125dcf97c94080b8c81b12665521df46c81a01408ad3295da925756ff7d636c1"
