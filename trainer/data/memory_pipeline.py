"""Batches of images that are decoded already: small ones are cut out by one gather, photos are resized as always on a CPU."""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bitfleet.trainer.data.bad_samples import BadSamples
from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.dataset import Dataset
from bitfleet.trainer.data.decoded_images import (
    DecodedImages,
    Decoder,
    Layout,
    dense_layout,
    padded_layout,
    why_broken,
)
from bitfleet.trainer.data.delivery import Delivery
from bitfleet.trainer.data.device_copies import CudaCopyStream, DeviceCopies
from bitfleet.trainer.data.request import Batch, Decoded, Geometry, Mend, Request
from bitfleet.trainer.data.resizing import Resizer
from bitfleet.trainer.data.sampler import Ints
from bitfleet.trainer.ranks.collectives import job_word

DEVICE_SHARE = 1 / 4
"""The part of a GPU's memory that decoded images may take there."""
_OUTLIER = 16  # times the pixels of the median: an image that is named where memory is short


def place_of(num_bytes: int, device: torch.device, geometry: Geometry) -> torch.device:
    """Return where decoded images lie: on the device of the model, or on the host if they are too large or are to be resized."""
    if device.type != "cuda" or geometry != "crop":
        return torch.device("cpu")
    fits = num_bytes <= DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return device if fits else torch.device("cpu")


class MemoryPipeline:
    """Makes batches when they are asked for, in the caller's thread; a GPU is never waited for."""

    def __init__(
        self,
        decoded: DecodedImages,
        *,
        geometry: Geometry,
        image_size: int,
        batch_size: int,
        num_threads: int,
        place: torch.device,
        device: torch.device,
    ) -> None:
        """Bring the images to where they are to lie.

        Args:
            decoded: All images of the list that requests are of, decoded.
            geometry: How a window of the image becomes the output. With "crop" all canvases are equally wide.
            image_size: Pixels, height and width of the output.
            batch_size: Images of a batch. With "crop" a request may be for many batches, which come one after the other.
            num_threads: Threads that resize; with "crop" torch's own threads work.
            place: Where the images are to lie, from `place_of`.
            device: Where the model runs.
        """
        assert geometry == "crop" or place.type == "cpu"
        self._layout, self._broken = decoded.layout, decoded.broken.copy()
        self._geometry = geometry
        self._image_size = image_size
        self._batch_size = batch_size
        self._place, self._device = place, device
        self.pixels = torch.from_numpy(decoded.pixels).to(place)
        """uint8 [N, 3], as the layout of the decoded images says."""
        keeps_memory = place.type == "cpu" or not decoded.memory.all_have_come
        self._memory = decoded.memory if keeps_memory else None
        self._grids = torch.from_numpy(window_grids(int(self._layout.widths[0]), image_size)).to(place)
        copies = DeviceCopies(CudaCopyStream(device)) if device.type == "cuda" and geometry != "crop" else None
        resized_later = geometry == "crop_bicubic" and copies is not None  # from the windows, on the GPU
        self._delivery = Delivery(copies, image_size=image_size, of_windows=resized_later)
        resized_here = geometry != "crop" and not resized_later
        self._resizer = Resizer(geometry, image_size, num_threads) if resized_here else None

    def batches(self, requests: Iterator[Request], mend: Mend) -> Iterator[Batch]:
        """See request.Pipeline; but nothing is read ahead."""
        if self._geometry != "crop":
            windows = self._windows(requests, mend)
            yield from self._delivery.batches(windows if self._resizer is None else self._resizer.resized(windows))
            return
        for images, labels in self._cut_out(requests, mend):
            yield _sent(images, self._device), _sent(labels, self._device)

    def _cut_out(self, requests: Iterator[Request], mend: Mend) -> Iterator[Batch]:
        size = self._batch_size
        for request in requests:
            table = self._table(request)
            broken = self._broken[request.samples]
            has_broken = bool(broken.any())
            for first in range(0, len(broken), size):
                part = slice(first, first + size)
                if has_broken and broken[part].any():
                    yield self._cut(self._table(self._mended(request.part(part), mend)))
                else:
                    yield self._cut(table[:, part])

    def _table(self, request: Request) -> Tensor:
        """Where windows begin, flips and labels, int64 [3, N], where the images lie: one copy for many batches."""
        layout, samples, starts = self._layout, request.samples, request.windows.starts
        table = np.empty((3, len(samples)), np.int64)
        rows, columns = starts[:, 0] + layout.padding, starts[:, 1] + layout.padding
        table[0] = layout.firsts[samples] + rows * layout.widths[samples] + columns
        table[1] = request.flips
        table[2] = request.images.labels[samples]
        return _sent(torch.from_numpy(table), self._place)

    def _cut(self, table: Tensor) -> Batch:
        firsts, flips, labels = table
        cut = cut_on_host if self._place.type == "cpu" else cut_on_device
        size = self._image_size
        return cut(self.pixels, self._grids, firsts, flips).view(len(labels), size, size, 3), labels

    def _windows(self, requests: Iterator[Request], mend: Mend) -> Iterator[Decoded]:
        """Yield the windows of each request, or whole images where those are resized first, and the request."""
        for request in requests:
            request = self._mended(request, mend)
            yield [self._window(request, position) for position in range(len(request.samples))], request

    def _window(self, request: Request, position: int) -> Tensor:
        sample = request.samples[position]
        first, height, width = (int(each[sample]) for each in self._layout[:3])
        image = self.pixels[first : first + height * width].view(height, width, 3)
        if self._geometry == "resize_crop":
            return image
        (top, left), (bottom, right) = (corner[position].tolist() for corner in request.windows)
        return image[top:bottom, left:right].contiguous()

    def _mended(self, request: Request, mend: Mend) -> Request:
        while self._broken[request.samples].any():
            request = mend(request, why_broken(request, self._broken))
        return request


def cut_on_device(pixels: Tensor, grids: Tensor, firsts: Tensor, flips: Tensor) -> Tensor:
    """Cut windows out of images, and mirror some of them, without waiting for the device.

    Args:
        pixels: Of all images, uint8 [P, 3].
        grids: From `window_grids`, int64 [2, size * size].
        firsts: The pixel in the upper left corner of each window, int64 [N].
        flips: 1 to mirror left to right, int64 [N].

    Returns:
        uint8 [N * size * size, 3].
    """
    index = grids.index_select(0, flips)
    index += firsts[:, None]
    return pixels.index_select(0, index.view(-1))


def cut_on_host(pixels: Tensor, grids: Tensor, firsts: Tensor, flips: Tensor) -> Tensor:
    """As `cut_on_device`, by numpy: threads of torch, of which each waits for the others, cost more than they gain here."""
    index = grids.numpy().take(flips.numpy(), axis=0)
    index += firsts.numpy()[:, None]
    return torch.from_numpy(pixels.numpy().take(index.ravel(), axis=0))


def window_grids(width: int, size: int) -> Ints:
    """The pixels of a window, counted from its upper left corner, and those of its mirror image.

    Args:
        width: Pixels in a row of the image.
        size: Pixels, height and width of the window.

    Returns:
        int64 [2, size * size].
    """
    columns = np.arange(size)
    rows = columns[:, None] * width
    return np.stack([rows + columns, rows + columns[::-1]]).reshape(2, -1)


def keep_in_memory(
    dataset: Dataset,
    split: Literal["training", "validation"],
    config: DataConfig,
    geometry: Geometry,
    decoder_for: Callable[[int], Decoder],
    bad: BadSamples,
    *,
    batch_size: int,
    num_threads: int,
    num_ranks: int,
    device: torch.device,
    shows_progress: bool,
) -> MemoryPipeline:
    """Decode the images of `split`, together with the other ranks of the machine.

    Args:
        dataset: From `open_dataset`.
        split: Whose images; a training run keeps both.
        config: The config that the data set was opened with.
        geometry: How a window of the image becomes the output.
        decoder_for: See DecodedImages.decode.
        bad: Its policy decides what becomes of a broken image.
        batch_size: Images of a batch.
        num_threads: Threads that resize.
        num_ranks: Ranks on this machine.
        device: Where the model runs.
        shows_progress: Whether this rank says how far it is.

    Raises:
        ValueError: The images take more memory than there may be, one of them is broken, or the disk does not answer.
    """
    layouts = _layouts(dataset, config)
    num_bytes = sum(layouts[each].num_bytes for each in (layouts if split == "training" else [split]))
    if num_bytes > config.memory_gib * 2**30:
        raise ValueError(
            f"data.loader='memory' needs {num_bytes / 2**30:.2f} GiB for the decoded images of {config.root}"
            f"{_largest(dataset, config)}, and data.memory_gib={config.memory_gib:g} are allowed: raise data.memory_gib if every "
            "machine has that memory, or use --data.loader dali"
        )
    images = dataset.train if split == "training" else dataset.val
    decoded = DecodedImages(images, layouts[split], job=job_word(), num_ranks=num_ranks)
    decoded.decode(decoder_for, bad, f"decode {split} images" if shows_progress else None)
    return MemoryPipeline(
        decoded,
        geometry=geometry,
        image_size=config.image_size,
        batch_size=batch_size,
        num_threads=num_threads,
        place=place_of(num_bytes, device, geometry),
        device=device,
    )


def _layouts(dataset: Dataset, config: DataConfig) -> dict[str, Layout]:
    if config.augmentation != "pad_crop":
        return {"training": dense_layout(dataset.train), "validation": dense_layout(dataset.val)}
    smallest = int(np.minimum(dataset.val.heights, dataset.val.widths).min())
    around = max(0, -(-(config.image_size - smallest) // 2))  # of the smallest, if its centre is larger than it is
    return {
        "training": padded_layout(dataset.train, config.crop_padding),
        "validation": padded_layout(dataset.val, around),
    }


def _largest(dataset: Dataset, config: DataConfig) -> str:
    """Name the image that decides how much memory is needed, where it is large against the others."""
    on_canvases = config.augmentation == "pad_crop"
    found = []
    for images in (dataset.train, dataset.val):
        heights, widths = images.heights.astype(np.int64), images.widths.astype(np.int64)
        sizes = np.maximum(heights, widths) ** 2 if on_canvases else heights * widths
        index = int(sizes.argmax())
        found.append((float(sizes[index] / np.median(sizes)), images, index))
    ratio, images, index = max(found, key=lambda each: each[0])
    if ratio < _OUTLIER:
        return ""
    share = "with pad_crop all take as much room as" if on_canvases else "the largest is"
    return f" ({share} {images.path(index)}, {images.widths[index]} x {images.heights[index]} pixels)"


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the host to a GPU without waiting for it."""
    if device.type == tensor.device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
