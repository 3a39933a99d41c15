"""The fallback for DALI: Pillow decodes, torchvision's v2 transforms crop and resize, threads share the images of a batch."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from bitfleet.trainer.data import official
from bitfleet.trainer.data.central_view import central_view, is_long
from bitfleet.trainer.data.decoding import image_of, reason_of
from bitfleet.trainer.data.delivery import Delivery
from bitfleet.trainer.data.device_copies import DeviceCopies
from bitfleet.trainer.data.request import Batch, Decoded, Geometry, Mend, Request
from bitfleet.trainer.data.stall import result_within

_BATCHES_AHEAD = 2
_LARGE_PIXELS = 1 << 25  # images of more are read one at a time: Pillow takes 4 bytes for a pixel, 0.13 to 0.72 GB each
_large = threading.Lock()  # of the process: training reads ahead while validation is under way


class TorchPipeline:
    """Reads requests ahead of their consumer, on the CPU; Pillow lets go of the interpreter while it decodes and resizes."""

    def __init__(
        self,
        *,
        geometry: Geometry,
        image_size: int,
        num_threads: int,
        stall_seconds: float,
        copies: DeviceCopies | None,
    ) -> None:
        """Nothing is read yet.

        Args:
            geometry: How a window of the image becomes the output.
            image_size: Pixels, height and width of the output.
            num_threads: Threads that read and decode.
            stall_seconds: How long a batch may take before the disk is asked whether it answers.
            copies: To the GPU where the model runs; None where it runs on the CPU.
        """
        Image.init()  # before the threads: they would all load Pillow's plugins at the same time
        self._geometry = geometry
        self._image_size = image_size
        self._stall_seconds = stall_seconds
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        resized_later = geometry == "crop_bicubic" and copies is not None  # from the windows, on the GPU
        # By each thread alone: all windows of a batch are as large as its images.
        self._resizes_windows = geometry == "crop_bicubic" and copies is None
        self._delivery = Delivery(copies, image_size=image_size, of_windows=resized_later)
        self._iteration: object = None

    def batches(self, requests: Iterator[Request], mend: Mend) -> Iterator[Batch]:
        """See request.Pipeline."""
        return self._delivery.batches(self.decoded(requests, mend))

    def decoded(self, requests: Iterator[Request], mend: Mend) -> Iterator[Decoded]:
        """Yield the images of each request, which may have been mended: finished ones, or windows that a GPU resizes."""
        self._iteration = iteration = object()
        ahead: deque[tuple[Request, list[Future[torch.Tensor | None]]]] = deque()
        while True:
            if self._iteration is not iteration:
                raise RuntimeError("this loader was iterated anew; the earlier iteration cannot go on")
            while len(ahead) <= _BATCHES_AHEAD and (request := next(requests, None)):
                ahead.append((request, self._submit(request)))
            if not ahead:
                return
            request, images = ahead.popleft()
            in_flight = [request, *(later for later, _ in ahead)]
            given = [result_within(image, self._stall_seconds, in_flight) for image in images]
            unreadable = {
                position: reason_of(request, position) or "Pillow cannot read it twice alike"
                for position, image in enumerate(given)
                if image is None
            }
            if unreadable:
                request = mend(request, unreadable)
                ahead.appendleft((request, self._submit(request)))
                continue
            yield [image for image in given if image is not None], request

    def _submit(self, request: Request) -> list[Future[torch.Tensor | None]]:
        return [self._threads.submit(self._image, request, position) for position in range(len(request.samples))]

    def _image(self, request: Request, position: int) -> torch.Tensor | None:
        """The image at `position`, [image_size, image_size, 3], or a window to be resized later; None if it cannot be read."""
        sample = int(request.samples[position])
        num_pixels = int(request.images.heights[sample]) * int(request.images.widths[sample])
        with _large if num_pixels > _LARGE_PIXELS else contextlib.nullcontext():
            return self._decoded(request, position)

    def _decoded(self, request: Request, position: int) -> torch.Tensor | None:
        try:
            image = image_of(request, position)
        except (OSError, ValueError):
            return None
        size, bilinear = self._image_size, InterpolationMode.BILINEAR
        (top, left), (bottom, right) = (corner[position].tolist() for corner in request.windows)
        if self._geometry in ("crop", "crop_bicubic", "whole"):
            image = image.crop((left, top, right, bottom))
        elif self._geometry == "crop_resize":
            image = v2.resized_crop(
                image, top, left, bottom - top, right - left, [size, size], bilinear, antialias=True
            )
        elif is_long(image.height, image.width, size):
            return torch.from_numpy(central_view(np.asarray(image), size).copy())
        else:  # the window is where these two lead
            image = v2.center_crop(v2.resize(image, [size * 256 // 224], bilinear, antialias=True), [size, size])
        pixels = np.array(image)
        if self._resizes_windows:
            flip = request.flips[position : position + 1]
            return official.resize_windows([torch.from_numpy(pixels)], flip, size)[0]
        mirror = request.flips[position] and self._geometry != "crop_bicubic"  # which is mirrored after it was resized
        return torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1]) if mirror else pixels)
