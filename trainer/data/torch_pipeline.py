"""Read batches without DALI: Pillow decodes, torchvision crops and resizes, in threads."""

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

from bitfleet.trainer.data import preprocessing
from bitfleet.trainer.data.bad_samples import image_of, reason_of
from bitfleet.trainer.data.delivery import Output
from bitfleet.trainer.data.request import Batch, Decoded, Recover, Request
from bitfleet.trainer.data.resizing import central_view, is_long
from bitfleet.trainer.data.stall import result_within

_BATCHES_AHEAD = 2
_LARGE_PIXELS = 1 << 25  # larger images are read one at a time: Pillow takes 4 bytes per pixel, 0.13 to 0.72 GB each
_large = threading.Lock()  # of the process: training reads ahead while validation runs


class TorchPipeline:
    """Reads requests ahead of their consumer, on the CPU; Pillow releases the GIL."""

    def __init__(self, output: Output) -> None:
        """Read nothing yet."""
        Image.init()  # before the threads, which would all load Pillow's plugins at the same time
        self._geometry, self._image_size = output.geometry, output.image_size
        self._stall_seconds = output.stall_seconds
        self._rand_augment = output.rand_augment
        self._threads = ThreadPoolExecutor(output.num_threads, thread_name_prefix="decode")
        # Each thread resizes its windows alone, so that a batch takes no more memory than its
        # images.
        self._resizes_windows = output.geometry == "crop_bicubic" and not output.resized_on_gpu
        self._delivery = output.delivery()
        self._iteration: object = None

    def batches(self, requests: Iterator[Request], recover: Recover) -> Iterator[Batch]:
        """Yield batches; see request.Pipeline."""
        return self._delivery.batches(self.decoded(requests, recover))

    def decoded(self, requests: Iterator[Request], recover: Recover) -> Iterator[Decoded]:
        """Yield finished images, or windows that a GPU resizes, and the recovered request."""
        self._iteration = iteration = object()
        ahead: deque[tuple[Request, list[Future[torch.Tensor | None]]]] = deque()
        while True:
            if self._iteration is not iteration:
                raise RuntimeError("this loader was iterated again; the earlier iteration cannot continue")
            while len(ahead) <= _BATCHES_AHEAD and (request := next(requests, None)):
                ahead.append((request, self._submit(request)))
            if not ahead:
                return
            request, futures = ahead.popleft()
            in_flight = [request, *(later for later, _ in ahead)]
            images = [result_within(future, self._stall_seconds, in_flight) for future in futures]
            unreadable = {
                position: reason_of(request, position) or "Pillow cannot read it twice alike"
                for position, image in enumerate(images)
                if image is None
            }
            if unreadable:
                request = recover(request, unreadable)
                ahead.appendleft((request, self._submit(request)))
                continue
            yield [image for image in images if image is not None], request

    def _submit(self, request: Request) -> list[Future[torch.Tensor | None]]:
        return [self._threads.submit(self._image, request, position) for position in range(len(request.samples))]

    def _image(self, request: Request, position: int) -> torch.Tensor | None:
        """Return the image at `position`, or a window to resize; None if it cannot be read."""
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
        else:  # these two steps lead to the window
            image = v2.center_crop(v2.resize(image, [size * 256 // 224], bilinear, antialias=True), [size, size])
        if self._rand_augment is not None:
            if request.flips[position]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image = self._rand_augment(image, request.epoch, int(request.samples[position]))
            return torch.from_numpy(np.array(image))
        pixels = np.array(image)
        if self._resizes_windows:
            flip = request.flips[position : position + 1]
            return preprocessing.resize_windows([torch.from_numpy(pixels)], flip, size)[0]
        mirror = request.flips[position] and self._geometry != "crop_bicubic"  # which is mirrored after the resize
        return torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1]) if mirror else pixels)
