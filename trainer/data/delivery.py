"""The last part of a loader: what was decoded becomes a batch on the device where the model runs."""

import ctypes
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfleet.trainer.data import official
from bitfleet.trainer.data.device_copies import DeviceCopies
from bitfleet.trainer.data.request import Batch, Decoded, Request

_kernel_fails = False


class Delivery:
    """Makes batches of what a pipeline decoded.

    Images travel to a GPU as bytes. Where official.py's resize is still to be done, the windows travel and are resized there.
    """

    def __init__(self, copies: DeviceCopies | None, *, image_size: int, of_windows: bool) -> None:
        """Nothing is copied yet.

        Args:
            copies: To the GPU where the model runs; None where it runs on the CPU, and then nothing is copied.
            image_size: Pixels, height and width of the output.
            of_windows: Windows of any size are decoded, which official.py's resize makes an image of.
        """
        self._copies = copies
        self._image_size = image_size
        self._of_windows = of_windows

    def batches(self, decoded: Iterable[Decoded]) -> Iterator[Batch]:
        """Yield the batch of each of `decoded`, in order: images on the CPU, and the request that they are of."""
        if self._copies is not None:
            yield from self._copies.batches(decoded, self._send)
            return
        for images, request in decoded:
            yield self._whole(images, request), request.labels

    def batches_of_dali(self, outputs: Iterable[tuple[Any, Request]]) -> Iterator[Batch]:
        """Yield the batch of each of `outputs` that DALI decoded on the GPU (None for no image), and its request."""
        assert self._copies is not None
        return self._copies.batches(outputs, self._take)

    def _whole(self, images: Sequence[Tensor], request: Request) -> Tensor:
        if not images:
            return torch.empty((0, self._image_size, self._image_size, 3), dtype=torch.uint8)
        if self._of_windows:
            return official.resize_windows(images, request.flips, self._image_size)
        if images[0].dim() == 3:
            return torch.stack(list(images))
        return images[0] if len(images) == 1 else torch.cat(list(images))

    def _send(self, decoded: Decoded) -> Batch:
        images, request = decoded
        assert self._copies is not None
        if not self._of_windows:
            pixels, labels = self._copies.send([images, [request.labels]])
            return self._images(pixels, request), labels.view(torch.int64)
        facts = official.window_facts([image.shape for image in images], request.flips)
        pixels, labels, sent_facts = self._copies.send([images, [request.labels], [facts]])
        return self._resized(pixels, facts, sent_facts), labels.view(torch.int64)

    def _take(self, decoded: tuple[Any, Request]) -> Batch:
        output, request = decoded
        assert self._copies is not None
        shapes: Sequence[Sequence[int]] = [] if output is None else output.shape()
        pixels = torch.empty(sum(map(math.prod, shapes)), dtype=torch.uint8, device=self._copies.stream.device)
        if output is not None:
            # A copy of our own: torch's allocator knows the streams that still read it, DALI's does not.
            stream = self._copies.stream.handle
            output.copy_to_external(
                ctypes.c_void_p(pixels.data_ptr()),
                None if stream is None else ctypes.c_void_p(stream.cuda_stream),
                non_blocking=True,
                use_copy_kernel=True,  # one launch, where the images do not lie one after the other
            )
            self._copies.keep(output)
        if not self._of_windows:
            (labels,) = self._copies.send([[request.labels]])
            return self._images(pixels, request), labels.view(torch.int64)
        facts = official.window_facts(shapes, request.flips)
        labels, sent_facts = self._copies.send([[request.labels], [facts]])
        return self._resized(pixels, facts, sent_facts), labels.view(torch.int64)

    def _images(self, pixels: Tensor, request: Request) -> Tensor:
        return pixels.view(len(request.samples), self._image_size, self._image_size, 3)

    def _resized(self, pixels: Tensor, facts: Tensor, sent_facts: Tensor) -> Tensor:
        return resize_on_device(pixels, facts, sent_facts.view(torch.int64).view(-1, 4), self._image_size)


def resize_on_device(windows: Tensor, facts: Tensor, sent_facts: Tensor, size: int) -> Tensor:
    """Resize windows where they are: in one launch on a GPU, through `official.resize_windows` where Triton fails and on a CPU.

    Args:
        windows: uint8, the bytes of all windows, one after the other.
        facts: From `official.window_facts`.
        sent_facts: The same, next to the windows.
        size: Pixels, height and width of the output.

    Returns:
        float32 [N, size, size, 3], the same bits either way.
    """
    global _kernel_fails
    if not len(facts):
        return torch.empty((0, size, size, 3), dtype=torch.float32, device=windows.device)
    if windows.is_cuda and not _kernel_fails:
        try:
            from bitfleet.trainer.data.bicubic_kernel import resize_bicubic

            return resize_bicubic(windows, sent_facts, size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # without a C compiler or Python.h: of many kinds, and before anything is written
            _kernel_fails = True
            problem = " ".join(str(error).splitlines()[:2])
            warnings.warn(
                f"torch resizes the images, in hundreds of launches, as Triton fails: {problem}", stacklevel=2
            )
    starts, *sides, flips = facts.T.tolist()
    views = [
        windows[start : start + 3 * height * width].view(height, width, 3)
        for start, height, width in zip(starts, *sides, strict=True)
    ]
    return official.resize_windows(views, np.array(flips, np.int32), size)
