"""DALI: files to batches of uint8 images. It is told which files and which windows; it keeps no state of its own."""

import contextlib
import importlib
import importlib.metadata
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.dlpack import from_dlpack

from bitfleet.trainer.data.sampler import Windows

# crop_resize: decode the window only, resize it. resize_crop: resize the whole image, take a window of the result.
# crop: take the window, black where it leaves the image.
Geometry = Literal["crop_resize", "resize_crop", "crop"]
Batch = tuple[torch.Tensor, torch.Tensor]

_PREFETCH_DEPTH = 2


class Request(NamedTuple):
    """One batch to be read: N <= batch_size images."""

    paths: npt.NDArray[np.bytes_]
    """Absolute paths [N]."""
    windows: Windows
    """int32, or float32 for resize_crop."""
    flips: npt.NDArray[np.int32]
    """1 to mirror left to right [N]."""
    labels: npt.NDArray[np.int64]
    """[N]."""

    def path(self, index: int) -> str:
        """Return the path of image `index` as text."""
        return os.fsdecode(bytes(self.paths[index]))


class ImagePipeline:
    """One DALI pipeline that reads requests ahead of their consumer.

    Building it costs milliseconds and threads, so it is kept from one iteration to the next.
    """

    def __init__(
        self,
        *,
        geometry: Geometry,
        image_size: int,
        batch_size: int,
        num_threads: int,
        device_index: int | None,
        largest_image_bytes: int,
    ) -> None:
        """Check that DALI is there; the pipeline is built when it is first used.

        Args:
            geometry: How a window of the image becomes the output.
            image_size: Pixels, height and width of the output.
            batch_size: The most images a request has.
            num_threads: Threads that read and decode.
            device_index: The CUDA device to decode on; None decodes on the CPU.
            largest_image_bytes: Height * width * 3 of the largest image: how much the GPU decoder allocates at once.

        Raises:
            ValueError: DALI is not installed, or both of its wheels are.
        """
        _check_installation()
        self._geometry = geometry
        self._image_size = image_size
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._device_index = device_index
        self._largest_image_bytes = largest_image_bytes
        self._feed = _Feed()
        self._pipeline: Any = None

    def batches(self, requests: Iterator[Request]) -> Iterator[Batch]:
        """Yield images, uint8 [N, image_size, image_size, 3], and labels, int64 [N], for each request, in order.

        Both are on the device and belong to the caller. A new call ends the iteration of an earlier one.

        Raises:
            ValueError: An image cannot be decoded; its path is named.
        """
        if self._pipeline is None:
            self._pipeline = self._build()
        self._drain()
        self._feed.requests = requests
        while True:
            if self._feed.requests is not requests:
                raise RuntimeError("this loader was iterated anew; the earlier iteration cannot go on")
            try:
                images = self._run()
            except StopIteration:
                return
            labels = torch.from_numpy(self._feed.in_flight.popleft().labels)
            yield images, labels.to(images.device, non_blocking=True)

    def _drain(self) -> None:
        """Finish what an abandoned iteration had under way, and make the pipeline ready for a new one."""
        self._feed.requests = iter(())
        try:
            while True:
                self._run()
        except StopIteration:
            self._feed.in_flight.clear()
            self._pipeline.reset()

    def _run(self) -> torch.Tensor:
        stream = None if self._device_index is None else torch.cuda.current_stream(self._device_index)
        try:
            (images,) = self._pipeline.run(stream)
        except RuntimeError:
            self._pipeline = None  # DALI: "Current pipeline object is no longer valid"
            unreadable = _find_unreadable(self._feed.in_flight)
            self._feed.in_flight.clear()
            if unreadable is None:
                raise
            path, reason = unreadable
            raise ValueError(
                f"the image {path} cannot be decoded ({reason}); replace the file, or remove it from its class folder"
            ) from None
        # The executor counts references to its buffers and hands out a new one for every batch (exec_dynamic), so the
        # tensor stays as it is without a copy. On a GPU the copy gives the memory to torch's allocator, which knows
        # the streams that still read it.
        tensor = from_dlpack(images.as_tensor())
        return tensor if self._device_index is None else tensor.clone()

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=self._device_index,
            prefetch_queue_depth=_PREFETCH_DEPTH,
            exec_dynamic=True,
        )
        # Grey, CMYK and palette images become RGB. EXIF orientation is not applied, as in torchvision: the
        # heights and widths that the windows are made from are those of the stored pixels.
        decoding: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "device": "cpu"}
        if self._device_index is not None:
            decoding |= {
                "device": "mixed",
                "device_memory_padding": self._largest_image_bytes,
                "host_memory_padding": self._largest_image_bytes,
                "jpeg_fancy_upsampling": True,  # as the CPU decoder does
            }
        window_type = types.FLOAT if self._geometry == "resize_crop" else types.INT32
        with pipeline:
            paths, starts, ends, flips = fn.external_source(
                source=self._feed,
                num_outputs=4,
                batch=True,
                dtype=[types.UINT8, window_type, window_type, types.INT32],
                ndim=[1, 1, 1, 0],
            )
            files = fn.io.file.read(paths)
            size = [self._image_size, self._image_size]
            if self._geometry == "crop_resize":
                images = fn.decoders.image_slice(files, start=starts, end=ends, axes=[0, 1], **decoding)
                images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
            elif self._geometry == "resize_crop":
                images = fn.decoders.image(files, **decoding)
                images = fn.resize(
                    images, size=size, roi_start=starts, roi_end=ends, interp_type=types.INTERP_LINEAR, antialias=True
                )
            else:
                images = fn.decoders.image(files, **decoding)
                images = fn.slice(
                    images, start=starts, end=ends, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
                )
            pipeline.set_outputs(fn.flip(images, horizontal=flips))
        pipeline.build()
        return pipeline


class _Feed:
    """What DALI calls for its inputs. Apart from ImagePipeline, so that no reference cycle keeps a pipeline alive."""

    def __init__(self) -> None:
        self.requests: Iterator[Request] = iter(())
        self.in_flight: deque[Request] = deque()

    def __call__(self) -> tuple[npt.NDArray[Any], ...]:
        request = next(self.requests)  # StopIteration ends the iteration: DALI's own convention
        self.in_flight.append(request)
        # One matrix for all paths costs half of what a list of arrays does; the file system ends a path at its NUL.
        paths = np.ascontiguousarray(request.paths).view(np.uint8).reshape(len(request.paths), -1)
        return paths, request.windows.starts, request.windows.ends, request.flips


def _find_unreadable(in_flight: Sequence[Request]) -> tuple[str, str] | None:
    """Return the path of the image that made DALI fail, and why; None if the failure is of another kind.

    DALI's message has no path in it. Pillow is asked first, since it can say what is wrong, then DALI, image by image,
    about the batch that failed: the oldest in flight.
    """
    for request in in_flight:
        for index in range(len(request.paths)):
            path = request.path(index)
            try:
                with Image.open(path) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                return path, str(error)
    for index in range(len(in_flight[0].paths)) if in_flight else ():
        if not _dali_reads(path := in_flight[0].path(index)):
            return path, "DALI does not read this format or variant"
    return None


def _dali_reads(path: str) -> bool:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        encoded = fn.external_source(source=[[np.frombuffer(os.fsencode(path), np.uint8)]], cycle=True)
        pipeline.set_outputs(fn.decoders.image(fn.io.file.read(encoded), device="cpu", output_type=types.RGB))
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


def _check_installation() -> None:
    extras = "'bitfleet[dali-cu13]' (CUDA 13) or 'bitfleet[dali-cu12]' (CUDA 12)"
    wheels = []
    for wheel in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(wheel)
            wheels.append(wheel)
    if len(wheels) > 1:
        raise ValueError(
            f"{' and '.join(wheels)} are both installed and have overwritten each other's files: "
            f"uninstall both, then pip install {extras}"
        )
    try:
        importlib.import_module("nvidia.dali")
    except ModuleNotFoundError:
        raise ValueError(f"NVIDIA DALI, which reads the images, is not installed: pip install {extras}") from None
