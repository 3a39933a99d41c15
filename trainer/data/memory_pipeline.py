"""Decode all images once and make batches from memory.

Small images are cut out by one gather; photos are resized on a CPU as by the other pipelines.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from bitfleet.trainer.data.bad_samples import BadSamples, reason_of
from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.dataset import Dataset
from bitfleet.trainer.data.delivery import Output
from bitfleet.trainer.data.image_list import ImageList
from bitfleet.trainer.data.machine_memory import MachineMemory
from bitfleet.trainer.data.request import Batch, Decoded, Geometry, Recover, Request
from bitfleet.trainer.data.resizing import Resizer
from bitfleet.trainer.data.sampler import Ints, Windows
from bitfleet.trainer.ranks.collectives import job_word

DEVICE_SHARE = 1 / 4
"""Largest share of a GPU's memory that decoded images may take."""
_OUTLIER = 16  # times the median number of pixels: such an image is named when memory is short
_CHUNK_BYTES, _CHUNK_IMAGES = 1 << 25, 128  # decoded together, at most: one job of a rank
_UNKNOWN_REASON = "the decoder does not read this format or variant"
_LINE_SECONDS = 10.0  # between two lines of progress in a file


class Decoder(Protocol):
    """Decodes whole images: DaliPipeline and TorchPipeline with the geometry "whole"."""

    def decoded(self, requests: Iterator[Request], recover: Recover) -> Iterator[Decoded]:
        """Yield images, uint8 [H, W, 3] on the CPU, and the recovered request, per request."""
        ...


class Layout(NamedTuple):
    """Position of images in memory: each has a canvas for it and its padding."""

    firsts: Ints
    """Index of the first pixel of each canvas [N]."""
    heights: Ints
    """Rows of the canvases [N]."""
    widths: Ints
    """Pixels per row of the canvases [N]."""
    padding: int
    """Black pixels above and on the left of each image."""
    num_pixels: int
    """Pixels of all canvases."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all pixels, three each."""
        return 3 * self.num_pixels


def padded_layout(images: ImageList, padding: int) -> Layout:
    """Give all images canvases of one size, with `padding` around the largest."""
    count = len(images)
    height, width = (int(sides.max()) + 2 * padding for sides in (images.heights, images.widths))
    firsts = np.arange(count) * (height * width)
    return Layout(firsts, np.full(count, height), np.full(count, width), padding, count * height * width)


def dense_layout(images: ImageList) -> Layout:
    """Give every image a canvas of its size."""
    heights, widths = images.heights.astype(np.int64), images.widths.astype(np.int64)
    ends = np.cumsum(heights * widths)
    return Layout(ends - heights * widths, heights, widths, 0, int(ends[-1]))


def progress_bar(title: str, num_images: int) -> Any:
    """Return a tqdm bar over images; in a file it is a line every 10 s, beginning after 10 s."""
    if sys.stderr.isatty():
        return tqdm(total=num_images, desc=title, unit="image", smoothing=0.05)
    return tqdm(
        total=num_images,
        desc=title,
        unit="image",
        delay=_LINE_SECONDS,
        mininterval=_LINE_SECONDS,
        miniters=1,
        bar_format="{desc}: {n:,} of {total:,} images, {rate_fmt}, {remaining} left\n",
    )


class DecodedImages:
    """All images of a list in the memory of the machine."""

    def __init__(self, images: ImageList, layout: Layout, *, job: str | None, num_ranks: int) -> None:
        """Allocate the memory; nothing is decoded yet.

        Args:
            images: The list.
            layout: Where its images will lie.
            job: See MachineMemory.
            num_ranks: Ranks of the job on this machine.

        Raises:
            ValueError: The machine has less memory available.
        """
        self.images, self.layout = images, layout
        self.memory = MachineMemory(layout.num_bytes + len(images), job=job, num_ranks=num_ranks)
        self.pixels: npt.NDArray[np.uint8] = self.memory.bytes[: layout.num_bytes].reshape(-1, 3)
        """uint8 [layout.num_pixels, 3]; 0 around images, and for broken ones."""
        self.broken: npt.NDArray[np.bool_] = self.memory.bytes[layout.num_bytes :].view(np.bool_)
        """True for images that cannot be decoded [N]."""

    def decode(self, decoder_for: Callable[[int], Decoder], bad: BadSamples, title: str | None) -> None:
        """Decode all images, together with the other ranks of the machine.

        Args:
            decoder_for: Returns a decoder for batches of at most N images.
            bad: Its policy decides whether a broken image ends the run now.
            title: Title of the progress bar; None for no bar.

        Raises:
            ValueError: By policy, or the disk does not answer.
        """
        num_images = len(self.images)
        size = self._chunk_size()
        num_chunks = -(-num_images // size)
        bar = progress_bar(title, num_images) if title is not None else None

        def check(num_done: int) -> None:
            if bad.ends_run and self.broken.any():
                request = self._request(np.flatnonzero(self.broken)[:1])
                bad.leave_out(request, reasons_of_broken(request, self.broken))
            if bar is not None:
                bar.update(min(num_done * size, num_images) - bar.n)

        requests = (
            self._request(np.arange(job * size, min((job + 1) * size, num_images)))
            for job in self.memory.take_jobs(num_chunks)
        )
        for pixels, request in decoder_for(size).decoded(requests, self._leave_out):
            for image, sample in zip(pixels, request.samples.tolist(), strict=True):
                self._store(image.numpy(), sample)
            check(self.memory.finish_job())
        self.memory.wait_for_jobs(num_chunks, check)
        check(num_chunks)
        if bar is not None:
            bar.close()

    def _chunk_size(self) -> int:
        largest = 3 * int(self.images.heights.max()) * int(self.images.widths.max())
        return max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // largest))

    def _request(self, samples: Ints) -> Request:
        ends = np.stack([self.images.heights[samples], self.images.widths[samples]], axis=1)
        no_flips = np.zeros(len(samples), np.int32)
        return Request(self.images, samples, Windows(np.zeros_like(ends), ends), no_flips, epoch=0)

    def _leave_out(self, request: Request, unreadable: Mapping[int, str]) -> Request:
        positions = list(unreadable)
        self.broken[request.samples[positions]] = True
        return request.without(positions)

    def _store(self, image: npt.NDArray[np.uint8], sample: int) -> None:
        rows, columns = int(self.images.heights[sample]), int(self.images.widths[sample])
        if image.shape[:2] != (rows, columns):  # the file was replaced since it was listed
            self.broken[sample] = True
            return
        first, height, width = (int(column[sample]) for column in self.layout[:3])
        canvas = self.pixels[first : first + height * width].reshape(height, width, 3)
        top = left = self.layout.padding
        canvas[top : top + rows, left : left + columns] = image


def reasons_of_broken(request: Request, broken: npt.NDArray[np.bool_]) -> dict[int, str]:
    """Return position -> reason for the images of `request` that `broken` marks."""
    return {
        position: reason_of(request, position) or _UNKNOWN_REASON
        for position in np.flatnonzero(broken[request.samples]).tolist()
    }


def storage_device(num_bytes: int, device: torch.device, geometry: Geometry) -> torch.device:
    """Return where decoded images lie: the model's device, or the host."""
    if device.type != "cuda" or geometry != "crop":
        return torch.device("cpu")
    fits = num_bytes <= DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return device if fits else torch.device("cpu")


class MemoryPipeline:
    """Makes batches on demand, in the caller's thread; never waits for a GPU."""

    def __init__(
        self, decoded: DecodedImages, output: Output, *, batch_size: int, storage: torch.device, device: torch.device
    ) -> None:
        """Bring the images to `storage`.

        Args:
            decoded: All images of the list that requests are for; "crop" needs canvases of one
                width.
            output: Form of the batches.
            batch_size: Images per batch. With "crop" a request may be for many consecutive batches.
            storage: Where the images will lie, from `storage_device`.
            device: Device of the model.
        """
        geometry, image_size = output.geometry, output.image_size
        assert geometry == "crop" or storage.type == "cpu"
        self._layout, self._broken = decoded.layout, decoded.broken.copy()
        self._geometry, self._image_size = geometry, image_size
        self._batch_size = batch_size
        self._storage, self._device = storage, device
        self.pixels = torch.from_numpy(decoded.pixels).to(storage)
        """uint8 [N, 3], in the layout of the decoded images."""
        keeps_memory = storage.type == "cpu" or not decoded.memory.all_have_joined
        self._memory = decoded.memory if keeps_memory else None
        self._grids = torch.from_numpy(window_grids(int(self._layout.widths[0]), image_size)).to(storage)
        self._delivery = output.delivery()
        resized_here = geometry != "crop" and not output.resized_on_gpu
        self._resizer = Resizer(geometry, image_size, output.num_threads) if resized_here else None

    def batches(self, requests: Iterator[Request], recover: Recover) -> Iterator[Batch]:
        """Yield batches; see request.Pipeline. Nothing is read ahead."""
        if self._geometry != "crop":
            windows = self._windows(requests, recover)
            yield from self._delivery.batches(windows if self._resizer is None else self._resizer.resized(windows))
            return
        for images, labels in self._cut_batches(requests, recover):
            yield _sent(images, self._device), _sent(labels, self._device)

    def _cut_batches(self, requests: Iterator[Request], recover: Recover) -> Iterator[Batch]:
        size = self._batch_size
        for request in requests:
            table = self._table(request)
            broken = self._broken[request.samples]
            has_broken = bool(broken.any())
            for first in range(0, len(broken), size):
                part = slice(first, first + size)
                if has_broken and broken[part].any():
                    yield self._cut(self._table(self._recovered(request.part(part), recover)))
                else:
                    yield self._cut(table[:, part])

    def _table(self, request: Request) -> Tensor:
        """Return window starts, flips and labels, int64 [3, N], on `storage`, in one copy."""
        layout, samples, starts = self._layout, request.samples, request.windows.starts
        table = np.empty((3, len(samples)), np.int64)
        rows, columns = starts[:, 0] + layout.padding, starts[:, 1] + layout.padding
        table[0] = layout.firsts[samples] + rows * layout.widths[samples] + columns
        table[1] = request.flips
        table[2] = request.images.labels[samples]
        return _sent(torch.from_numpy(table), self._storage)

    def _cut(self, table: Tensor) -> Batch:
        firsts, flips, labels = table
        cut = cut_on_host if self._storage.type == "cpu" else cut_on_device
        size = self._image_size
        return cut(self.pixels, self._grids, firsts, flips).view(len(labels), size, size, 3), labels

    def _windows(self, requests: Iterator[Request], recover: Recover) -> Iterator[Decoded]:
        """Yield windows, or whole images if those are resized first, and the request."""
        for request in requests:
            request = self._recovered(request, recover)
            yield [self._window(request, position) for position in range(len(request.samples))], request

    def _window(self, request: Request, position: int) -> Tensor:
        sample = request.samples[position]
        first, height, width = (int(column[sample]) for column in self._layout[:3])
        image = self.pixels[first : first + height * width].view(height, width, 3)
        if self._geometry == "resize_crop":
            return image
        (top, left), (bottom, right) = (corner[position].tolist() for corner in request.windows)
        return image[top:bottom, left:right].contiguous()

    def _recovered(self, request: Request, recover: Recover) -> Request:
        while self._broken[request.samples].any():
            request = recover(request, reasons_of_broken(request, self._broken))
        return request


def cut_on_device(pixels: Tensor, grids: Tensor, firsts: Tensor, flips: Tensor) -> Tensor:
    """Cut windows out of images, and mirror some of them, without waiting for the device.

    Args:
        pixels: Pixels of all images, uint8 [P, 3].
        grids: From `window_grids`, int64 [2, size * size].
        firsts: Index of the upper left pixel of each window, int64 [N].
        flips: 1 to mirror left to right, int64 [N].

    Returns:
        uint8 [N * size * size, 3].
    """
    index = grids.index_select(0, flips)
    index += firsts[:, None]
    return pixels.index_select(0, index.view(-1))


def cut_on_host(pixels: Tensor, grids: Tensor, firsts: Tensor, flips: Tensor) -> Tensor:
    """Cut as `cut_on_device` does, with numpy: torch's threads cost more than they gain."""
    index = grids.numpy().take(flips.numpy(), axis=0)
    index += firsts.numpy()[:, None]
    return torch.from_numpy(pixels.numpy().take(index.ravel(), axis=0))


def window_grids(width: int, size: int) -> Ints:
    """Return the pixel indices of a window and its mirror image, from its upper left corner.

    Args:
        width: Pixels per row of the image.
        size: Height and width of the window, pixels.

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
    output: Output,
    decoder_for: Callable[[int], Decoder],
    bad: BadSamples,
    *,
    batch_size: int,
    num_ranks: int,
    device: torch.device,
    shows_progress: bool,
) -> MemoryPipeline:
    """Decode the images of `split`, together with the other ranks of the machine.

    Args:
        dataset: From `open_dataset`.
        split: Images to decode; a training run keeps both splits in memory.
        config: Config that the data set was opened with.
        output: Form of the batches.
        decoder_for: See DecodedImages.decode.
        bad: Policy for broken images.
        batch_size: Images per batch.
        num_ranks: Ranks on this machine.
        device: Device of the model.
        shows_progress: Show a progress bar on this rank.

    Raises:
        ValueError: The images need more memory than allowed, one is broken, or the disk does not
            answer.
    """
    layouts = _layouts(dataset, config)
    kept: Sequence[str] = list(layouts) if split == "training" else [split]
    num_bytes = sum(layouts[name].num_bytes for name in kept)
    if num_bytes > config.memory_gib * 2**30:
        raise ValueError(
            f"data.loader='memory' needs {num_bytes / 2**30:.2f} GiB for the decoded images of {config.root}"
            f"{_largest(dataset, config)}, and data.memory_gib={config.memory_gib:g} are allowed: raise "
            "data.memory_gib if every machine has that memory, or use --data.loader dali"
        )
    images = dataset.train if split == "training" else dataset.val
    decoded = DecodedImages(images, layouts[split], job=job_word(), num_ranks=num_ranks)
    decoded.decode(decoder_for, bad, f"decode {split} images" if shows_progress else None)
    storage = storage_device(num_bytes, device, output.geometry)
    return MemoryPipeline(decoded, output, batch_size=batch_size, storage=storage, device=device)


def _layouts(dataset: Dataset, config: DataConfig) -> dict[str, Layout]:
    if config.augmentation != "pad_crop":
        return {"training": dense_layout(dataset.train), "validation": dense_layout(dataset.val)}
    smallest = int(np.minimum(dataset.val.heights, dataset.val.widths).min())
    around = max(0, -(-(config.image_size - smallest) // 2))  # if the window is larger than the smallest image
    return {
        "training": padded_layout(dataset.train, config.crop_padding),
        "validation": padded_layout(dataset.val, around),
    }


def _largest(dataset: Dataset, config: DataConfig) -> str:
    """Name the image that determines the memory, if it is much larger than the others."""
    on_canvases = config.augmentation == "pad_crop"
    largest = []
    for images in (dataset.train, dataset.val):
        heights, widths = images.heights.astype(np.int64), images.widths.astype(np.int64)
        sizes = np.maximum(heights, widths) ** 2 if on_canvases else heights * widths
        index = int(sizes.argmax())
        largest.append((float(sizes[index] / np.median(sizes)), images, index))
    ratio, images, index = max(largest, key=lambda row: row[0])
    if ratio < _OUTLIER:
        return ""
    share = "with pad_crop all take as much room as" if on_canvases else "the largest is"
    return f" ({share} {images.path(index)}, {images.widths[index]} x {images.heights[index]} pixels)"


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; from the host to a GPU without waiting."""
    if device.type == tensor.device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
