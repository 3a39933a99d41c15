"""DALI: files to batches of uint8 images. It is told which files and which windows; it keeps no state of its own."""

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from bitfleet.trainer.data.dali_feed import PILLOW_SUFFIXES, Feed, named
from bitfleet.trainer.data.dali_graph import Graph, build_pipeline
from bitfleet.trainer.data.decoding import reason_of
from bitfleet.trainer.data.delivery import Delivery
from bitfleet.trainer.data.device_copies import DeviceCopies
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.parts import in_parts, whole_batches
from bitfleet.trainer.data.request import Batch, Decoded, Geometry, Mend, Request
from bitfleet.trainer.data.resizing import Resizer
from bitfleet.trainer.data.stall import result_within

_MANY_WEBP = 32  # that DALI cannot read, as lossless ones with a profile or EXIF: the whole set will be such


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
        images: ImageList,
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
            images: What requests are of.
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
        self._in_shards = images.offsets is not None
        self._by_pillow = named(images, PILLOW_SUFFIXES)  # learnt of others when DALI fails at them
        self._said_so = False
        self._stall_seconds = stall_seconds
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
        self._graph = Graph(
            geometry=geometry,
            image_size=image_size,
            with_windows=self._windows_in_dali,
            with_flips=self._flips_in_dali,
            resizes=not resized_here,
            largest_image_bytes=3 * int((images.heights.astype(np.int64) * images.widths).max()),
            fast_idct=fast_idct,
        )
        self._feed = self._new_feed()
        self._pipeline: Any = None
        self._iteration: object = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dali")

    def batches(self, requests: Iterator[Request], mend: Mend) -> Iterator[Batch]:
        """See request.Pipeline."""
        if self._device_index is not None:
            return self._delivery.batches_of_dali(self._outputs(requests, mend))
        decoded = self.decoded(in_parts(requests), mend)
        return self._delivery.batches(
            whole_batches(decoded if self._resizer is None else self._resizer.resized(decoded))
        )

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
        return Feed(
            in_shards=self._in_shards,
            by_pillow=self._by_pillow,
            with_windows=self._windows_in_dali,
            with_flips=self._flips_in_dali,
        )

    def _mend(self, mend: Mend, failure: RuntimeError) -> Request | None:
        """Have the oldest batch mended, which made DALI fail, and read it again; the request, if nothing is left of it."""
        self._pipeline = None  # DALI: "Current pipeline object is no longer valid"
        failed = self._feed.in_flight.popleft() if self._feed.in_flight else None
        unreadable, for_pillow = self._looked_at(failed) if failed else ({}, [])
        if failed is None or not (unreadable or for_pillow):
            raise failure  # of another kind
        if for_pillow:
            self._leave_to_pillow(failed, for_pillow)
        mended = mend(failed, unreadable)._replace(ends_batch=failed.ends_batch) if unreadable else failed
        if len(mended.samples):
            self._feed.again([mended])
            return None
        self._feed.again([])
        return mended

    def _leave_to_pillow(self, request: Request, positions: Sequence[int]) -> None:
        self._by_pillow[request.samples[positions]] = True
        # To learn of an image takes 5 ms. Of WebP both decoders give the same bytes, so that others may be left to Pillow, too.
        webp = named(request.images, (b".webp",))
        if (self._by_pillow & webp).sum() >= _MANY_WEBP:
            self._by_pillow |= webp
        if not self._said_so:
            self._said_so = True
            print(
                f"bitfleet: Pillow reads {request.path(positions[0])}, and others like it: DALI does not, and may have printed "
                "lines about it",
                file=sys.stderr,
                flush=True,
            )

    def _looked_at(self, request: Request) -> tuple[dict[int, str], list[int]]:
        """Of the images of `request` that DALI, asked for each alone, cannot give: position -> reason, and those Pillow reads.

        With the window of the request: what is unreadable must not depend on what was read before.
        """
        unreadable: dict[int, str] = {}
        for_pillow: list[int] = []
        pipeline, feed = None, self._new_feed()
        for position in range(len(request.samples)):
            feed.start(iter([request.part(slice(position, position + 1))]))
            pipeline = pipeline or self._build(feed, batch_size=1)
            try:
                while result_within(self._thread.submit(_next_output, pipeline, None), self._stall_seconds, [request]):
                    pass
                pipeline.reset()
            except RuntimeError:
                pipeline = None
                if reason := reason_of(request, position):
                    unreadable[position] = reason
                elif self._by_pillow[request.samples[position]]:
                    unreadable[position] = "Pillow cannot read it twice alike"
                else:
                    for_pillow.append(position)
        return unreadable, for_pillow

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
        return build_pipeline(self._graph, feed, batch_size, self._num_threads, self._device_index)


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
