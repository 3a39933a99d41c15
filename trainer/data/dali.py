"""Read batches of uint8 images with DALI, which gets files and windows and has no other state."""

import contextlib
import importlib
import importlib.metadata
import itertools
import os
import struct
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from bitfleet.trainer.data.bad_samples import image_of, reason_of
from bitfleet.trainer.data.delivery import Output
from bitfleet.trainer.data.image_list import ImageList
from bitfleet.trainer.data.request import Batch, Decoded, Geometry, Recover, Request, in_parts, joined_parts
from bitfleet.trainer.data.resizing import Resizer
from bitfleet.trainer.data.stall import result_within

FIRST_BYTES = [0xFF, 0x89, ord("R")]
"""First bytes of JPEG, PNG and RIFF (WebP), the formats that DALI reads as Pillow does."""
_ALL_BYTES = -1  # a dimension of a reshape
_PREFETCH_DEPTH = 2
# DALI's defaults. The decoder allocates the first once and the second twice per thread, so the
# largest image of a set, perhaps 100 MB, must not set them: it is decoded anyway, into memory that
# grows then.
_MOST_DEVICE_PADDING, _MOST_HOST_PADDING = 16 << 20, 8 << 20
_BATCHES_AHEAD = 2
_READERS = 8  # threads that wait for a disk or a network
# Formats that DALI does not read as Pillow does. Without such a name in the list DALI reads the
# files itself.
_PILLOW_SUFFIXES = b".bmp .tif .tiff .ppm .pgm .pbm .pnm .pfm .jp2 .j2k .j2c .jpc .jpx .jpf".split()
_MANY_WEBP = 32  # unreadable for DALI, as lossless ones with a profile or EXIF: assume that all WebP of the set are
_PNG_SIGNATURE, _PNG_DEPTH, _PNG_RGB = b"\x89PNG\r\n\x1a\n", 8, 2
_Encoded = list[npt.NDArray[np.uint8]]


class DaliPipeline:
    """A DALI pipeline that reads requests ahead of their consumer.

    Building it costs milliseconds and threads, so iterations share it. It runs in a separate
    thread: a read that never returns must not keep the process from reporting it.
    """

    def __init__(
        self, output: Output, images: ImageList, *, batch_size: int, device_index: int | None, fast_idct: bool
    ) -> None:
        """Check that DALI is installed; the pipeline is built when it is first used.

        Args:
            output: Form of the batches.
            images: List that the requests are for.
            batch_size: Most images of a request.
            device_index: CUDA device to decode on; None decodes on the CPU.
            fast_idct: Decode JPEGs on the CPU with libjpeg's fast transform, TensorFlow's default.

        Raises:
            ValueError: DALI is not installed, or both of its wheels are.
        """
        check_installation()
        assert device_index is None or output.copies is not None
        self._output = output
        self._batch_size = batch_size
        self._device_index = device_index
        self._in_shards = images.offsets is not None
        self._by_pillow = has_suffix(images, _PILLOW_SUFFIXES)  # others are added when DALI fails at them
        self._pillow_reported = False
        geometry = output.geometry
        resized_here = geometry != "crop" and device_index is None and not output.resized_on_gpu
        self._resizer = Resizer(geometry, output.image_size, output.num_threads) if resized_here else None
        self._delivery = output.delivery()
        self._graph = _Graph(
            geometry=geometry,
            image_size=output.image_size,
            with_windows=not (resized_here and geometry in ("resize_crop", "whole")),
            with_flips=not resized_here and geometry != "crop_bicubic",
            resizes=not resized_here,
            largest_image_bytes=3 * int((images.heights.astype(np.int64) * images.widths).max()),
            fast_idct=fast_idct,
        )
        self._feed = self._new_feed()
        self._pipeline: Any = None
        self._iteration: object = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dali")

    def batches(self, requests: Iterator[Request], recover: Recover) -> Iterator[Batch]:
        """Yield batches; see request.Pipeline."""
        if self._device_index is not None:
            return self._delivery.batches_of_dali(self._outputs(requests, recover))
        decoded = self.decoded(in_parts(requests), recover)
        resized = decoded if self._resizer is None else self._resizer.resized(decoded)
        return self._delivery.batches(joined_parts(resized))

    def decoded(self, requests: Iterator[Request], recover: Recover) -> Iterator[Decoded]:
        """Yield images decoded on the CPU, in one tensor or one each, and the recovered request."""
        for output, request in self._outputs(requests, recover):
            yield self._tensors(output), request

    def _outputs(self, requests: Iterator[Request], recover: Recover) -> Iterator[tuple[Any, Request]]:
        """Yield DALI's output, None for an empty request, and the recovered request."""
        self._drain()
        self._iteration = iteration = object()
        self._feed.start(requests)
        while True:
            if self._iteration is not iteration:
                raise RuntimeError("this loader was iterated again; the earlier iteration cannot continue")
            try:
                output = self._run()
            except StopIteration:
                return
            except RuntimeError as failure:
                if (emptied := self._recover(recover, failure)) is not None:
                    yield None, emptied
                continue
            yield output, self._feed.in_flight.popleft()

    def _new_feed(self) -> "_Feed":
        return _Feed(self._graph, in_shards=self._in_shards, by_pillow=self._by_pillow)

    def _recover(self, recover: Recover, failure: RuntimeError) -> Request | None:
        """Replace unreadable images of the batch that failed, and queue it again.

        Returns:
            The request if no image is left of it, else None.
        """
        self._pipeline = None  # DALI: "Current pipeline object is no longer valid"
        failed = self._feed.in_flight.popleft() if self._feed.in_flight else None
        unreadable, for_pillow = self._diagnose(failed) if failed else ({}, [])
        if failed is None or not (unreadable or for_pillow):
            raise failure  # not because of an image
        if for_pillow:
            self._leave_to_pillow(failed, for_pillow)
        recovered = recover(failed, unreadable)._replace(ends_batch=failed.ends_batch) if unreadable else failed
        if len(recovered.samples):
            self._feed.restart([recovered])
            return None
        self._feed.restart([])
        return recovered

    def _leave_to_pillow(self, request: Request, positions: Sequence[int]) -> None:
        self._by_pillow[request.samples[positions]] = True
        # Finding one takes 5 ms. Both decoders give the same bytes of WebP, so all of them may be
        # left to Pillow.
        webp = has_suffix(request.images, (b".webp",))
        if (self._by_pillow & webp).sum() >= _MANY_WEBP:
            self._by_pillow |= webp
        if not self._pillow_reported:
            self._pillow_reported = True
            print(
                f"bitfleet: Pillow reads {request.path(positions[0])}, and others like it: DALI does not, and may have "
                "printed lines about it",
                file=sys.stderr,
                flush=True,
            )

    def _diagnose(self, request: Request) -> tuple[dict[int, str], list[int]]:
        """Return position -> reason of unreadable images, and the positions that only Pillow reads.

        DALI is asked for each image alone, with the window of the request: what is unreadable must
        not depend on what was read before.
        """
        unreadable: dict[int, str] = {}
        for_pillow: list[int] = []
        pipeline, feed = None, self._new_feed()
        for position in range(len(request.samples)):
            feed.start(iter([request.part(slice(position, position + 1))]))
            pipeline = pipeline or self._build(feed, batch_size=1)
            try:
                while result_within(
                    self._thread.submit(_next_output, pipeline, None), self._output.stall_seconds, [request]
                ):
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
        """Finish what an abandoned iteration left in flight, and reset the pipeline."""
        if self._pipeline is None:
            self._pipeline = self._build(self._feed, self._batch_size)
        self._feed.stop()
        try:
            while True:
                self._run()
        except StopIteration:
            self._feed.in_flight.clear()
            self._pipeline.reset()
        except RuntimeError:  # from a batch that is no longer wanted
            self._pipeline = None

    def _run(self) -> Any:
        """Return the next output of the pipeline."""
        if self._pipeline is None:
            self._pipeline = self._build(self._feed, self._batch_size)
        # For images decoded on the GPU, the copying stream waits for them there instead of a thread
        # here.
        copies = self._output.copies
        stream = None if self._device_index is None or copies is None else copies.stream.handle
        running = self._thread.submit(_next_output, self._pipeline, stream)
        output = result_within(running, self._output.stall_seconds, self._feed.in_flight)
        if output is None:
            raise StopIteration
        return output

    def _tensors(self, output: Any) -> list[torch.Tensor]:
        """Return the images of a CPU output, not copied, in one tensor or one each."""
        if output is None:
            return []
        # The executor counts references to its buffers and hands out a new one per batch
        # (exec_dynamic), so the tensors stay valid.
        if self._output.geometry == "crop":
            return [from_dlpack(output.as_tensor())]
        return [from_dlpack(output[index]) for index in range(len(output))]

    def _build(self, feed: "_Feed", batch_size: int) -> Any:
        return _build_pipeline(self._graph, feed, batch_size, self._output.num_threads, self._device_index)


def _next_output(pipeline: Any, stream: Any) -> Any:
    """Return the next output of `pipeline`; None, not StopIteration, at the end."""
    try:
        (output,) = pipeline.run(stream)
    except StopIteration:
        return None
    return output


def check_installation() -> None:
    """Check that DALI can be imported.

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
        problem = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise ValueError(
            f"NVIDIA DALI, which reads the images, {problem}: pip install {extras}; a run can also read them with "
            "torchvision: --data.loader torch"
        ) from None


class _Graph(NamedTuple):
    """Operations of a pipeline."""

    geometry: Geometry
    image_size: int
    with_windows: bool
    """Windows are an input; without them whole images come out."""
    with_flips: bool
    """Flips are an input."""
    resizes: bool
    """DALI resizes, if the geometry has a resize."""
    largest_image_bytes: int
    """Height * width * 3 of the largest image: the most that the GPU decoder allocates at once."""
    fast_idct: bool


class _Feed:
    """DALI's input callback, which remembers the requests whose images are still to come.

    DALI gets paths of files, or bytes that threads read ahead, if images are in shards or Pillow
    decodes some. Separate from DaliPipeline, so that no reference cycle keeps a pipeline alive.
    """

    def __init__(self, graph: _Graph, *, in_shards: bool, by_pillow: npt.NDArray[np.bool_]) -> None:
        """Read nothing yet.

        Args:
            graph: Operations, which decide the inputs.
            in_shards: Images are parts of larger files, which DALI cannot read itself.
            by_pillow: True for images of the list that Pillow decodes [N]; may change before
                `restart`.
        """
        self.in_flight: deque[Request] = deque()
        """Requests that DALI has received and whose batch has not been taken, oldest first."""
        self._graph = graph
        self._requests: Iterator[Request] = iter(())
        self._in_shards, self._by_pillow = in_shards, by_pillow
        self._readers: ThreadPoolExecutor | None = None
        self._start_readers()
        self._ahead: deque[tuple[Request, list[Future[_Encoded]]]] = deque()

    @property
    def gives_bytes(self) -> bool:
        """True if DALI gets encoded images instead of paths, since `start` or `restart`."""
        return self._readers is not None

    def start(self, requests: Iterator[Request]) -> None:
        """Give `requests` from now on."""
        self._start_readers()
        self._requests = requests
        self.in_flight.clear()
        self._ahead.clear()

    def _start_readers(self) -> None:
        if self._readers is None and (self._in_shards or self._by_pillow.any()):
            self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="readers")

    def stop(self) -> None:
        """Give no more requests; those in flight stay there."""
        self._requests = iter(())
        self._ahead.clear()

    def restart(self, first: Sequence[Request]) -> None:
        """Give `first`, then again what is in flight, then the rest, to a new pipeline."""
        pending = [*first, *self.in_flight, *(request for request, _ in self._ahead)]
        self.start(itertools.chain(pending, self._requests))

    def __call__(self) -> tuple[Any, ...]:
        """Return the inputs of the next batch; StopIteration ends the iteration, as DALI wants."""
        if self._readers is None:
            request = next(self._requests)
            images = request.images
            paths = np.char.add(os.fsencode(images.folder) + b"/", images.names[request.samples])
            # One matrix of all paths costs half of a list of arrays; the file system ends a path at
            # its NUL.
            files: Any = np.ascontiguousarray(paths).view(np.uint8).reshape(len(paths), -1)
        else:
            request, files = self._read_ahead(self._readers)
        self.in_flight.append(request)
        listed = (request.images.heights[request.samples], request.images.widths[request.samples])
        inputs = [files, np.stack(listed, axis=1).astype(np.int64)]
        if self._graph.with_windows:
            inputs += [request.windows.starts, request.windows.ends]
        if self._graph.with_flips:
            inputs.append(request.flips)
        return tuple(inputs)

    def _read_ahead(self, readers: ThreadPoolExecutor) -> tuple[Request, _Encoded]:
        while len(self._ahead) <= _BATCHES_AHEAD and (request := next(self._requests, None)):
            shares = np.array_split(np.arange(len(request.samples)), min(_READERS, len(request.samples)))
            self._ahead.append((request, [readers.submit(_read, request, share, self._by_pillow) for share in shares]))
        if not self._ahead:
            raise StopIteration
        request, futures = self._ahead[0]
        encoded = [image for future in futures for image in future.result()]
        self._ahead.popleft()
        return request, encoded


def _read(request: Request, positions: npt.NDArray[np.int64], by_pillow: npt.NDArray[np.bool_]) -> _Encoded:
    encoded = []
    for position in positions.tolist():
        try:
            if by_pillow[request.samples[position]]:
                image = plain_png(np.asarray(image_of(request, position)))
            else:
                image = request.read(position)
        except (OSError, ValueError):  # DALI fails at it, and then the reason is found
            image = b"\0"
        encoded.append(np.frombuffer(image or b"\0", np.uint8))
    return encoded


def plain_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return uint8 [H, W, 3] as an uncompressed PNG file, at the speed of a copy.

    Pillow's writer tries filters even at level 0 and takes six times as long.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # a row starts with its filter: 0 is none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, _PNG_DEPTH, _PNG_RGB, 0, 0, 0)
    file = _PNG_SIGNATURE
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.data, 0)), (b"IEND", b"")):
        checksum = zlib.crc32(data, zlib.crc32(kind))
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return file


def has_suffix(images: ImageList, suffixes: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """Return whether each name ends in one of `suffixes`, in lower or upper case [N]."""
    cases = [case(suffix) for suffix in suffixes for case in (bytes.lower, bytes.upper)]
    matches: npt.NDArray[np.bool_] = np.any([np.strings.endswith(images.names, suffix) for suffix in cases], axis=0)
    return matches


def _build_pipeline(graph: _Graph, feed: _Feed, batch_size: int, num_threads: int, device_index: int | None) -> Any:
    """Build the pipeline that reads `feed`; it decodes on the CPU if `device_index` is None."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_index,
        prefetch_queue_depth=_PREFETCH_DEPTH,
        exec_dynamic=True,
    )
    window_type = types.FLOAT if graph.geometry == "resize_crop" else types.INT32
    kinds = [(types.UINT8, 1), (types.INT64, 1)]
    kinds += [(window_type, 1), (window_type, 1)] * graph.with_windows + [(types.INT32, 0)] * graph.with_flips
    with pipeline:
        files, sizes, *others = fn.external_source(
            source=feed,
            num_outputs=len(kinds),
            batch=True,
            dtype=[dtype for dtype, _ in kinds],
            ndim=[ndim for _, ndim in kinds],
        )
        if not feed.gives_bytes:
            files = fn.io.file.read(files)
        images = _decoded_windows(graph, _parsed(files, sizes), others, device_index)
        if graph.with_flips:
            images = fn.flip(images, horizontal=others[-1])
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _decoded_windows(graph: _Graph, files: Any, others: list[Any], device_index: int | None) -> Any:
    """Decode `files`, then crop and resize for the geometry."""
    from nvidia.dali import fn, types

    # Grey, CMYK and palette images become RGB. EXIF orientation is not applied, as in torchvision:
    # the heights and widths that windows are made from are those of the stored pixels.
    decoding: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "device": "cpu"}
    if device_index is not None:
        decoding |= gpu_decoding(graph.largest_image_bytes)
    elif graph.fast_idct:
        decoding["use_fast_idct"] = True
    resizing: dict[str, Any] = {
        "size": [graph.image_size] * 2,
        "interp_type": types.INTERP_LINEAR,
        "antialias": True,
    }
    if graph.geometry in ("crop_resize", "crop_bicubic"):
        images = fn.decoders.image_slice(files, start=others[0], end=others[1], axes=[0, 1], **decoding)
    else:
        images = fn.decoders.image(files, **decoding)
    if graph.geometry == "crop_resize" and graph.resizes:
        images = fn.resize(images, **resizing)
    elif graph.geometry == "resize_crop" and graph.resizes:
        images = fn.resize(images, roi_start=others[0], roi_end=others[1], **resizing)
    elif graph.geometry == "crop":
        images = fn.slice(
            images, start=others[0], end=others[1], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
        )
    return images


def gpu_decoding(largest_image_bytes: int) -> dict[str, Any]:
    """Return the GPU arguments of DALI's decoder.

    Args:
        largest_image_bytes: Height * width * 3 of the largest image.
    """
    return {
        "device": "mixed",
        "device_memory_padding": min(largest_image_bytes, _MOST_DEVICE_PADDING),
        "host_memory_padding": min(largest_image_bytes, _MOST_HOST_PADDING),
        "jpeg_fancy_upsampling": True,  # as the CPU decoder does
    }


def _parsed(files: Any, sizes: Any) -> Any:
    """Return `files` unchanged after all of them have been parsed and have the height and width in
    `sizes`; an error here ends the batch.

    The windows were drawn for the listed sizes; in an image that was replaced by another one since,
    they would be somewhere else, or beyond its border.

    DALI 2.4's decoders cut a batch of 32 or more in parts; if a file of one part cannot be parsed,
    the threads of the other parts continue with freed memory, and the process may crash. An
    operator that reads only headers waits for its threads. It takes 5 us per image, and 3 more to
    fail at formats other than JPEG, PNG and WebP, several of which DALI reads to other colours than
    Pillow (decoding.py).
    """
    from nvidia.dali import fn, types

    found = fn.peek_image_shape(files, adjust_orientation=False)
    # 0, which is no format's first byte, for an image of another size. Nothing is copied.
    first_bytes = files[0:1] * (found[0:1] == sizes[0:1]) * (found[1:2] == sizes[1:2])
    shape = fn.lookup_table(
        first_bytes,
        keys=FIRST_BYTES,
        values=[_ALL_BYTES] * len(FIRST_BYTES),
        default_value=0,  # does not fit: a file has bytes
        dtype=types.INT32,
    )
    return fn.reshape(files, shape=shape)
