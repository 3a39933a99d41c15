"""DALI: files to batches of uint8 images. It is told which files and which windows; it keeps no state of its own."""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from bitfleet.trainer.data.dali_feed import Feed
from bitfleet.trainer.data.decoding import reason_of
from bitfleet.trainer.data.delivery import Delivery
from bitfleet.trainer.data.device_copies import DeviceCopies
from bitfleet.trainer.data.request import Batch, Decoded, Geometry, Mend, Request
from bitfleet.trainer.data.resizing import Resizer
from bitfleet.trainer.data.stall import result_within

_PREFETCH_DEPTH = 2
# DALI's defaults. The decoder allocates the first once and the second twice for each thread, so the largest image of a set, which
# may have 100 MB, must not set them: it is decoded all the same, into memory that grows then.
_MOST_DEVICE_PADDING, _MOST_HOST_PADDING = 16 << 20, 8 << 20


class DaliPipeline:
    """One DALI pipeline that reads requests ahead of their consumer.

    Building it costs milliseconds and threads, so it is kept from one iteration to the next. It runs in a thread of its own:
    a read that never returns must not keep the process from saying so.
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
        in_shards: bool,
        stall_seconds: float,
        copies: DeviceCopies | None,
        fast_idct: bool,
    ) -> None:
        """Check that DALI is there; the pipeline is built when it is first used.

        Args:
            geometry: How a window of the image becomes the output.
            image_size: Pixels, height and width of the output.
            batch_size: The most images a request has.
            num_threads: Threads that read and decode.
            device_index: The CUDA device to decode on; None decodes on the CPU.
            largest_image_bytes: Height * width * 3 of the largest image: the most that the GPU decoder allocates at once.
            in_shards: Images are parts of larger files, which DALI cannot read itself.
            stall_seconds: How long a batch may take before the disk is asked whether it answers.
            copies: To the GPU where the model runs; None where it runs on the CPU.
            fast_idct: Decode JPEGs on the CPU with libjpeg's fast transform, as TensorFlow does by default: the same pixels.

        Raises:
            ValueError: DALI is not installed, or both of its wheels are.
        """
        check_installation()
        self._geometry = geometry
        self._image_size = image_size
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._device_index = device_index
        self._largest_image_bytes = largest_image_bytes
        self._in_shards = in_shards
        self._stall_seconds = stall_seconds
        self._fast_idct = fast_idct
        assert device_index is None or copies is not None
        self._copies = copies
        resized_later = geometry == "crop_bicubic" and copies is not None  # from the windows, on the GPU
        resized_here = geometry != "crop" and device_index is None and not resized_later
        self._resizer = Resizer(geometry, image_size, num_threads) if resized_here else None
        self._delivery = Delivery(copies, image_size=image_size, of_windows=resized_later)
        self._windows_in_dali = not (
            resized_here and geometry in ("resize_crop", "whole")
        )  # else whole images come out
        self._flips_in_dali = not resized_here and geometry != "crop_bicubic"
        self._feed = self._new_feed()
        self._pipeline: Any = None
        self._iteration: object = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dali")

    def batches(self, requests: Iterator[Request], mend: Mend) -> Iterator[Batch]:
        """See request.Pipeline."""
        if self._device_index is not None:
            return self._delivery.batches_of_dali(self._outputs(requests, mend))
        decoded = self.decoded(requests, mend)
        return self._delivery.batches(decoded if self._resizer is None else self._resizer.resized(decoded))

    def decoded(self, requests: Iterator[Request], mend: Mend) -> Iterator[Decoded]:
        """Yield what was decoded on the CPU for each request, which may have been mended: the batch, or an image each."""
        for output, request in self._outputs(requests, mend):
            yield self._tensors(output), request

    def _outputs(self, requests: Iterator[Request], mend: Mend) -> Iterator[tuple[Any, Request]]:
        """Yield what DALI gives for each request, and the request, which may have been mended; None for an empty one."""
        self._drain()
        self._iteration = iteration = object()
        self._feed.start(requests)
        while True:
            if self._iteration is not iteration:
                raise RuntimeError("this loader was iterated anew; the earlier iteration cannot go on")
            try:
                output = self._run()
            except StopIteration:
                return
            except RuntimeError as failure:
                if (emptied := self._mend(mend, failure)) is not None:
                    yield None, emptied
                continue
            yield output, self._feed.in_flight.popleft()

    def _new_feed(self) -> Feed:
        return Feed(in_shards=self._in_shards, with_windows=self._windows_in_dali, with_flips=self._flips_in_dali)

    def _mend(self, mend: Mend, failure: RuntimeError) -> Request | None:
        """Have the oldest batch mended, which made DALI fail, and read it again; the request, if nothing is left of it."""
        self._pipeline = None  # DALI: "Current pipeline object is no longer valid"
        failed = self._feed.in_flight.popleft() if self._feed.in_flight else None
        unreadable = self._unreadable(failed) if failed else {}
        if failed is None or not unreadable:
            raise failure  # of another kind
        mended = mend(failed, unreadable)
        if len(mended.samples):
            self._feed.again([mended])
            return None
        self._feed.again([])
        return mended

    def _unreadable(self, request: Request) -> dict[int, str]:
        """Position -> reason of the images of `request` that DALI, asked for each alone, cannot give.

        With the window of the request: what is unreadable must not depend on what was read before.
        """
        found: dict[int, str] = {}
        pipeline, feed = None, self._new_feed()
        for position in range(len(request.samples)):
            feed.start(iter([request.part(slice(position, position + 1))]))
            pipeline = pipeline or self._build(feed, batch_size=1)
            try:
                while result_within(self._thread.submit(_next_output, pipeline, None), self._stall_seconds, [request]):
                    pass
                pipeline.reset()
            except RuntimeError:
                found[position] = reason_of(request, position) or "DALI does not read this format or variant"
                pipeline = None
        return found

    def _drain(self) -> None:
        """Finish what an abandoned iteration had under way, and make the pipeline ready for a new one."""
        if self._pipeline is None:
            self._pipeline = self._build(self._feed, self._batch_size)
        self._feed.stop()
        try:
            while True:
                self._run()
        except StopIteration:
            self._feed.in_flight.clear()
            self._pipeline.reset()
        except RuntimeError:  # of a batch that nobody wants any more
            self._pipeline = None

    def _run(self) -> Any:
        """The next output of the pipeline."""
        if self._pipeline is None:
            self._pipeline = self._build(self._feed, self._batch_size)
        # Where images are decoded on the GPU, the stream that copies them waits for them there, and no thread here.
        stream = None if self._device_index is None or self._copies is None else self._copies.stream.handle
        running = self._thread.submit(_next_output, self._pipeline, stream)
        output = result_within(running, self._stall_seconds, self._feed.in_flight)
        if output is None:
            raise StopIteration
        return output

    def _tensors(self, output: Any) -> list[torch.Tensor]:
        """The images of an output on the CPU, without a copy: all in one, or each alone where their sizes differ."""
        if output is None:
            return []
        # The executor counts references to its buffers and hands out a new one for every batch (exec_dynamic), so the
        # tensors stay as they are.
        if self._geometry == "crop":
            return [from_dlpack(output.as_tensor())]
        return [from_dlpack(output[index]) for index in range(len(output))]

    def _build(self, feed: Feed, batch_size: int) -> Any:
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self._num_threads,
            device_id=self._device_index,
            prefetch_queue_depth=_PREFETCH_DEPTH,
            exec_dynamic=True,
        )
        # Grey, CMYK and palette images become RGB. EXIF orientation is not applied, as in torchvision: the
        # heights and widths that the windows are made from are those of the stored pixels.
        decoding: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "device": "cpu"}
        if self._device_index is not None:
            decoding |= gpu_decoding(self._largest_image_bytes)
        elif self._fast_idct:
            decoding["use_fast_idct"] = True
        window_type = types.FLOAT if self._geometry == "resize_crop" else types.INT32
        kinds = [(types.UINT8, 1)]
        kinds += [(window_type, 1), (window_type, 1)] * self._windows_in_dali + [(types.INT32, 0)] * self._flips_in_dali
        resizing: dict[str, Any] = {
            "size": [self._image_size] * 2,
            "interp_type": types.INTERP_LINEAR,
            "antialias": True,
        }
        with pipeline:
            files, *others = fn.external_source(
                source=feed,
                num_outputs=len(kinds),
                batch=True,
                dtype=[dtype for dtype, _ in kinds],
                ndim=[ndim for _, ndim in kinds],
            )
            if not self._in_shards:
                files = fn.io.file.read(files)
            files = _parsed(files)
            if self._geometry in ("crop_resize", "crop_bicubic"):
                images = fn.decoders.image_slice(files, start=others[0], end=others[1], axes=[0, 1], **decoding)
            else:
                images = fn.decoders.image(files, **decoding)
            if self._geometry == "crop_resize" and self._resizer is None:
                images = fn.resize(images, **resizing)
            elif self._geometry == "resize_crop" and self._resizer is None:
                images = fn.resize(images, roi_start=others[0], roi_end=others[1], **resizing)
            elif self._geometry == "crop":
                images = fn.slice(
                    images, start=others[0], end=others[1], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
                )
            if self._flips_in_dali:
                images = fn.flip(images, horizontal=others[-1])
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline


def gpu_decoding(largest_image_bytes: int) -> dict[str, Any]:
    """Return the arguments of DALI's decoder that are for the GPU alone.

    Args:
        largest_image_bytes: Height * width * 3 of the largest image.
    """
    return {
        "device": "mixed",
        "device_memory_padding": min(largest_image_bytes, _MOST_DEVICE_PADDING),
        "host_memory_padding": min(largest_image_bytes, _MOST_HOST_PADDING),
        "jpeg_fancy_upsampling": True,  # as the CPU decoder does
    }


def _parsed(files: Any) -> Any:
    """The files, unchanged, once all of them have been parsed; an error here ends the batch.

    DALI 2.4's decoders cut a batch of 32 or more in parts; where a file in one part cannot be parsed, the threads that are at the
    others go on with memory that is freed, and the process may crash. What looks at headers alone waits for its threads. It
    takes 5 us per image.
    """
    from nvidia.dali import fn, types

    shapes = fn.peek_image_shape(files)
    unknown = fn.cast(0 * shapes[0:1] - 1, dtype=types.INT32)  # -1: as many bytes as there are
    return fn.reshape(files, shape=unknown)  # has to wait for the shapes, copies nothing


def _next_output(pipeline: Any, stream: Any) -> Any:
    """The next output of `pipeline`; None at the end (a future cannot hold a StopIteration)."""
    try:
        (output,) = pipeline.run(stream)
    except StopIteration:
        return None
    return output


def check_installation() -> None:
    """Check that DALI is there.

    Raises:
        ValueError: DALI is not installed, or both of its wheels are.
    """
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
    except ImportError as error:
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise ValueError(
            f"NVIDIA DALI, which reads the images, {why}: pip install {extras}, or read them with torchvision: "
            "--data.loader torch"
        ) from None
