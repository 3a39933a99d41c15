"""The images of a list, decoded once: uint8 pixels in memory, one image after the other, and which of them are broken."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bitfleet.trainer.data.bad_samples import BadSamples
from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.decoding import reason_of
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.machine_memory import MachineMemory
from bitfleet.trainer.data.request import Mend, Request
from bitfleet.trainer.data.sampler import Ints, Windows
from bitfleet.trainer.data.workers import Bar

_CHUNK_BYTES, _CHUNK_IMAGES = 1 << 25, 128  # decoded together, at most: a rank's piece of work
_UNKNOWN_REASON = "the decoder does not read this format or variant"


class Decoder(Protocol):
    """What decodes whole images: DaliPipeline and TorchPipeline with the geometry "whole"."""

    def decoded(self, requests: Iterator[Request], mend: Mend) -> Iterator[tuple[Sequence[torch.Tensor], Request]]:
        """Yield the images of each request, uint8 [H, W, 3] on the CPU, and the request, which `mend` may have changed."""
        ...


class Layout(NamedTuple):
    """Where images lie in memory. Each has a canvas of its own, as large as the image and its padding, or larger."""

    firsts: Ints
    """Pixels in front of the canvas of each image [N]."""
    heights: Ints
    """Rows of the canvases [N]."""
    widths: Ints
    """Pixels in a row of the canvases [N]."""
    padding: int
    """Pixels of 0 above and on the left of each image."""
    num_pixels: int
    """Of all canvases."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the pixels, three each."""
        return 3 * self.num_pixels


def padded_layout(images: ImageList, padding: int) -> Layout:
    """Give every image a canvas of one size, with `padding` pixels around the largest: a window is then one index away."""
    count = len(images)
    height, width = (int(sides.max()) + 2 * padding for sides in (images.heights, images.widths))
    firsts = np.arange(count) * (height * width)
    return Layout(firsts, np.full(count, height), np.full(count, width), padding, count * height * width)


def dense_layout(images: ImageList) -> Layout:
    """Give every image a canvas of its own size."""
    heights, widths = images.heights.astype(np.int64), images.widths.astype(np.int64)
    ends = np.cumsum(heights * widths)
    return Layout(ends - heights * widths, heights, widths, 0, int(ends[-1]))


def decoder_of(config: DataConfig) -> Literal["dali", "torch"]:
    """Return what decodes the images of a run: two loaders of one decoder give the same bytes.

    data.loader="memory" decodes as "dali" does where DALI is installed. Where it is not, Pillow decodes, as for "torch", if
    nothing is resized afterwards.
    """
    if config.loader != "memory":
        return config.loader
    return "dali" if config.augmentation != "pad_crop" or _dali_is_installed() else "torch"


def _dali_is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nothing of nvidia
        return False


class DecodedImages:
    """All images of a list in the memory of the machine."""

    def __init__(self, images: ImageList, layout: Layout, *, job: str | None, num_ranks: int) -> None:
        """Find the memory; nothing is decoded yet.

        Args:
            images: The list.
            layout: Where its images are to lie.
            job: See MachineMemory.
            num_ranks: Ranks of the job on this machine.

        Raises:
            ValueError: The machine has less memory available.
        """
        self.images, self.layout = images, layout
        self.memory = MachineMemory(layout.num_bytes + len(images), job=job, num_ranks=num_ranks)
        self.pixels: npt.NDArray[np.uint8] = self.memory.bytes[: layout.num_bytes].reshape(-1, 3)
        """uint8 [layout.num_pixels, 3]; 0 around the images, and where one is broken."""
        self.broken: npt.NDArray[np.bool_] = self.memory.bytes[layout.num_bytes :].view(np.bool_)
        """Whether an image cannot be decoded [N]."""

    def decode(self, decoder_for: Callable[[int], Decoder], bad: BadSamples, title: str | None) -> None:
        """Decode all images, together with the other ranks of the machine.

        Args:
            decoder_for: Makes what decodes batches of at most so many images.
            bad: Its policy decides whether a broken image ends the run now.
            title: For the progress bar; None for none.

        Raises:
            ValueError: By policy, or the disk does not answer.
        """
        num_images = len(self.images)
        size = self._chunk_size()
        num_chunks = -(-num_images // size)
        progress = Bar(title, num_images) if title is not None else None
        shown = 0

        def look(num_done: int) -> None:
            nonlocal shown
            if bad.ends_run and self.broken.any():
                request = self._whole(np.flatnonzero(self.broken)[:1])
                bad.leave_out(request, why_broken(request, self.broken))
            if progress is not None:
                shown, before = min(num_done * size, num_images), shown
                progress.after(shown - before, None)

        requests = (
            self._whole(np.arange(job * size, min((job + 1) * size, num_images)))
            for job in self.memory.take_jobs(num_chunks)
        )
        for pixels, request in decoder_for(size).decoded(requests, self._leave_out):
            for image, sample in zip(pixels, request.samples.tolist(), strict=True):
                self._keep(image.numpy(), sample)
            look(self.memory.finish_job())
        self.memory.wait_for_jobs(num_chunks, look)
        look(num_chunks)
        if progress is not None:
            progress.close()

    def _chunk_size(self) -> int:
        largest = 3 * int(self.images.heights.max()) * int(self.images.widths.max())
        return max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // largest))

    def _whole(self, samples: Ints) -> Request:
        ends = np.stack([self.images.heights[samples], self.images.widths[samples]], axis=1)
        no_flips = np.zeros(len(samples), np.int32)
        return Request(self.images, samples, Windows(np.zeros_like(ends), ends), no_flips, epoch=0)

    def _leave_out(self, request: Request, unreadable: Mapping[int, str]) -> Request:
        positions = list(unreadable)
        self.broken[request.samples[positions]] = True
        return request.without(positions)

    def _keep(self, image: npt.NDArray[np.uint8], sample: int) -> None:
        rows, columns = int(self.images.heights[sample]), int(self.images.widths[sample])
        if image.shape[:2] != (rows, columns):  # replaced by another one since it was listed
            self.broken[sample] = True
            return
        first, height, width = (int(each[sample]) for each in self.layout[:3])
        canvas = self.pixels[first : first + height * width].reshape(height, width, 3)
        top = left = self.layout.padding
        canvas[top : top + rows, left : left + columns] = image


def why_broken(request: Request, broken: npt.NDArray[np.bool_]) -> dict[int, str]:
    """Position -> reason of the images of `request` that `broken`, a value for each image of the list, says so of."""
    return {
        position: reason_of(request, position) or _UNKNOWN_REASON
        for position in np.flatnonzero(broken[request.samples]).tolist()
    }
