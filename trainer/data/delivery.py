"""Turn decoded images into batches on the device of the model.

Images travel to a GPU as bytes, from pinned memory, one batch ahead, on a separate stream. The host
waits for the GPU only in the thread that fills the pinned buffers; the consumer's stream waits for
the copy of its batch, on the GPU.
"""

import ctypes
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bitfleet.trainer.data import preprocessing
from bitfleet.trainer.data.augmentation import RandAugment
from bitfleet.trainer.data.request import Batch, Decoded, Geometry, Request

Source = TypeVar("Source")

_NUM_BUFFERS = 2  # one is filled while the other one is copied
_ALIGNMENT = 16  # bytes: a tensor of any type may start there
_kernel_fails = False


class CopyStream:
    """A CUDA stream for copies, next to the model's; tests record its calls on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Take a stream of `device`, which starts CUDA in this process."""
        self.device = device
        self.handle = torch.cuda.Stream(device)

    def active(self) -> AbstractContextManager[Any]:
        """Return a context in which torch queues work and allocates memory on the stream."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self.handle)
        return context

    def pinned(self, num_bytes: int) -> Tensor:
        """Return host memory that the GPU can read directly, uint8 [num_bytes]."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, pinned: Tensor) -> Tensor:
        """Queue a copy of `pinned` to the device and return it at once."""
        return pinned.to(self.device, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        """Return an event after everything queued so far; waiting for it does not poll."""
        event = torch.cuda.Event(blocking=True)
        event.record(self.handle)
        return event

    def hand_over(self, tensors: Sequence[Tensor], event: torch.cuda.Event) -> None:
        """Make the caller's current stream wait for `event` and own the memory of `tensors`."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(current)


class DeviceCopies:
    """A thread and a stream that bring the batches of one loader to the device."""

    def __init__(self, stream: CopyStream) -> None:
        """Start nothing yet; pinned memory for two batches comes with the first ones."""
        self.stream = stream
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._buffers = deque(_Buffer() for _ in range(_NUM_BUFFERS))
        self._kept: deque[tuple[object, torch.cuda.Event]] = deque()

    def batches(self, sources: Iterable[Source], place: Callable[[Source], Batch]) -> Iterator[Batch]:
        """Yield the batch of each of `sources`, when the copy of the next one is queued.

        An error of `sources` is raised after the batches before it.

        Args:
            sources: Decoded batches; iterated in the caller's thread.
            place: Queues what makes a batch on the device; called in the thread, with the stream
                active.
        """
        under_way: deque[Future[tuple[Batch, torch.cuda.Event]]] = deque()
        failure: Exception | None = None
        remaining = iter(sources)
        while True:
            try:
                source = next(remaining)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            under_way.append(self._thread.submit(self._place, source, place))
            if len(under_way) > 1:
                yield self._take(under_way.popleft())
        while under_way:
            yield self._take(under_way.popleft())
        if failure is not None:
            raise failure

    def send(self, groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Copy groups of CPU tensors to the device in one transfer; called by `place`.

        Returns:
            Per group the bytes of its tensors, one after the other, uint8 on the device. All groups
            share one storage, in which each starts at a multiple of 16 bytes.
        """
        starts, end = [], 0
        for group in groups:
            starts.append(end)
            end += -(-sum(tensor.nbytes for tensor in group) // _ALIGNMENT) * _ALIGNMENT
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        host = buffer.free(end, self.stream)
        ends = []
        for start, group in zip(starts, groups, strict=True):
            ends.append(start + sum(tensor.nbytes for tensor in group))
            if group:
                parts = [tensor.numpy().reshape(-1).view(np.uint8) for tensor in group]
                np.concatenate(parts, out=host[start : ends[-1]].numpy())
        sent = self.stream.copy(host)
        buffer.copied = self.stream.record()
        return [sent[start:stop] for start, stop in zip(starts, ends, strict=True)]

    def keep(self, owner: object) -> None:
        """Keep `owner` alive until what is queued now has finished; called by `place`."""
        self._kept.append((owner, self.stream.record()))

    def _place(self, source: Source, place: Callable[[Source], Batch]) -> tuple[Batch, torch.cuda.Event]:
        with self.stream.active():
            while self._kept and self._kept[0][1].query():
                self._kept.popleft()
            return place(source), self.stream.record()

    def _take(self, placed: Future[tuple[Batch, torch.cuda.Event]]) -> Batch:
        batch, event = placed.result()
        self.stream.hand_over(batch, event)
        return batch


class _Buffer:
    """Pinned memory that is filled again only after its last copy has finished."""

    def __init__(self) -> None:
        self.copied: torch.cuda.Event | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def free(self, num_bytes: int, stream: CopyStream) -> Tensor:
        """Return `num_bytes` of the memory, which nothing reads any more."""
        if self.copied is not None:
            self.copied.synchronize()
        if len(self._memory) < num_bytes:
            self._memory = stream.pinned(1 << (num_bytes - 1).bit_length())  # what torch would round it up to
        return self._memory[:num_bytes]


class Delivery:
    """Makes batches of what a pipeline decoded; resizes windows on a GPU."""

    def __init__(self, copies: DeviceCopies | None, *, image_size: int, of_windows: bool) -> None:
        """Copy nothing yet; `of_windows`: inputs are windows that are still to be resized."""
        self._copies = copies
        self._image_size = image_size
        self._of_windows = of_windows

    def batches(self, decoded: Iterable[Decoded]) -> Iterator[Batch]:
        """Yield the batch of each of `decoded`, images on the CPU and their request, in order."""
        if self._copies is not None:
            yield from self._copies.batches(decoded, self._send)
            return
        for images, request in decoded:
            yield self._on_cpu(images, request), request.labels

    def batches_of_dali(self, outputs: Iterable[tuple[Any, Request]]) -> Iterator[Batch]:
        """Yield the batch of each output of DALI on the GPU (None for no image)."""
        assert self._copies is not None
        return self._copies.batches(outputs, self._take)

    def _on_cpu(self, images: Sequence[Tensor], request: Request) -> Tensor:
        if not images:
            return torch.empty((0, self._image_size, self._image_size, 3), dtype=torch.uint8)
        if self._of_windows:
            return preprocessing.resize_windows(images, request.flips, self._image_size)
        if images[0].dim() == 3:
            return torch.stack(list(images))
        return images[0] if len(images) == 1 else torch.cat(list(images))

    def _send(self, decoded: Decoded) -> Batch:
        images, request = decoded
        assert self._copies is not None
        if not self._of_windows:
            pixels, labels = self._copies.send([images, [request.labels]])
            return self._images(pixels, request), labels.view(torch.int64)
        table = preprocessing.window_table([image.shape for image in images], request.flips)
        pixels, labels, sent_table = self._copies.send([images, [request.labels], [table]])
        return self._resized(pixels, table, sent_table), labels.view(torch.int64)

    def _take(self, decoded: tuple[Any, Request]) -> Batch:
        output, request = decoded
        assert self._copies is not None
        shapes: Sequence[Sequence[int]] = [] if output is None else output.shape()
        pixels = torch.empty(sum(map(math.prod, shapes)), dtype=torch.uint8, device=self._copies.stream.device)
        if output is not None:
            # Copied, because torch's allocator knows the streams that still read it and DALI's does
            # not.
            stream = self._copies.stream.handle
            output.copy_to_external(
                ctypes.c_void_p(pixels.data_ptr()),
                None if stream is None else ctypes.c_void_p(stream.cuda_stream),
                non_blocking=True,
                use_copy_kernel=True,  # one launch, even if the images are not contiguous
            )
            self._copies.keep(output)
        if not self._of_windows:
            (labels,) = self._copies.send([[request.labels]])
            return self._images(pixels, request), labels.view(torch.int64)
        table = preprocessing.window_table(shapes, request.flips)
        labels, sent_table = self._copies.send([[request.labels], [table]])
        return self._resized(pixels, table, sent_table), labels.view(torch.int64)

    def _images(self, pixels: Tensor, request: Request) -> Tensor:
        return pixels.view(len(request.samples), self._image_size, self._image_size, 3)

    def _resized(self, pixels: Tensor, table: Tensor, sent_table: Tensor) -> Tensor:
        return resize_on_device(pixels, table, sent_table.view(torch.int64).view(-1, 4), self._image_size)


class Output(NamedTuple):
    """Form of the batches that a pipeline makes."""

    geometry: Geometry
    image_size: int
    """Height and width, pixels."""
    num_threads: int
    """Threads that decode and resize."""
    stall_seconds: float
    """Longest wait for a batch before its files are probed."""
    copies: DeviceCopies | None
    """Copies to the GPU of the model; None for a model on the CPU."""
    rand_augment: RandAugment | None = None
    """Changes images after crop and flip (torch_pipeline.py)."""

    @property
    def resized_on_gpu(self) -> bool:
        """True if windows travel to the GPU and are resized there."""
        return self.geometry == "crop_bicubic" and self.copies is not None

    def delivery(self) -> Delivery:
        """Return what makes such batches of decoded images."""
        return Delivery(self.copies, image_size=self.image_size, of_windows=self.resized_on_gpu)


def resize_on_device(windows: Tensor, table: Tensor, sent_table: Tensor, size: int) -> Tensor:
    """Resize windows where they are, in one Triton launch on a GPU.

    Args:
        windows: uint8, the bytes of all windows, one after the other.
        table: From `preprocessing.window_table`.
        sent_table: The same, on the device of the windows.
        size: Height and width of the output, pixels.

    Returns:
        float32 [N, size, size, 3], the same bits either way.
    """
    global _kernel_fails
    if not len(table):
        return torch.empty((0, size, size, 3), dtype=torch.float32, device=windows.device)
    if windows.is_cuda and not _kernel_fails:
        try:
            from bitfleet.trainer.data.bicubic_kernel import resize_bicubic

            return resize_bicubic(windows, sent_table, size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # without a C compiler or Python.h: of many types, before anything is written
            _kernel_fails = True
            problem = " ".join(str(error).splitlines()[:2])
            warnings.warn(
                f"torch resizes the images, in hundreds of launches, as Triton fails: {problem}", stacklevel=2
            )
    starts, *sides, flips = table.T.tolist()
    views = [
        windows[start : start + 3 * height * width].view(height, width, 3)
        for start, height, width in zip(starts, *sides, strict=True)
    ]
    return preprocessing.resize_windows(views, np.array(flips, np.int32), size)
