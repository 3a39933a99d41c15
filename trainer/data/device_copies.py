"""Batches on their way to a GPU: from pinned memory, one batch ahead, on a stream of their own.

The host never waits for the GPU here, but in the thread that fills the pinned buffers. The stream of whoever takes a batch waits
for the batch's copy, on the GPU.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bitfleet.trainer.data.request import Batch

Source = TypeVar("Source")

_NUM_BUFFERS = 2  # one is filled while the other one is copied
_ALIGNMENT = 16  # bytes: a tensor of any type may start there


class Event(Protocol):
    """A point in the work of a stream; torch.cuda.Event is one."""

    def query(self) -> bool:
        """Return whether the stream has come past it."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream has come past it."""
        ...


class CopyStream(Protocol):
    """What copies need of CUDA: a stream next to the one that the model runs on. Tests record its calls on a CPU."""

    @property
    def device(self) -> torch.device:
        """Where copies go to."""
        ...

    @property
    def handle(self) -> Any:
        """The torch.cuda.Stream, for libraries that queue work on it."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Inside, torch queues work and allocates memory on the stream."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """Return host memory that the GPU reads by itself, uint8 [num_bytes]."""
        ...

    def copy(self, pinned: Tensor) -> Tensor:
        """Queue a copy of `pinned` to the device and return it at once."""
        ...

    def record(self) -> Event:
        """Return the point after everything that was queued so far."""
        ...

    def hand_over(self, tensors: Sequence[Tensor], event: Event) -> None:
        """Have the caller's current stream wait for `event`, and the memory of `tensors` for what the caller queues there."""
        ...


class CudaCopyStream:
    """A CopyStream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Take a stream of `device`; that starts CUDA in this process."""
        self.device = device
        self.handle = torch.cuda.Stream(device)

    def active(self) -> AbstractContextManager[Any]:
        """See CopyStream."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self.handle)
        return context

    def pinned(self, num_bytes: int) -> Tensor:
        """See CopyStream."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, pinned: Tensor) -> Tensor:
        """See CopyStream."""
        return pinned.to(self.device, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        """See CopyStream; whoever waits for the event sleeps instead of asking again and again."""
        event = torch.cuda.Event(blocking=True)
        event.record(self.handle)
        return event

    def hand_over(self, tensors: Sequence[Tensor], event: Any) -> None:
        """See CopyStream."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(current)


class DeviceCopies:
    """A thread and a stream that bring the batches of one loader to the device."""

    def __init__(self, stream: CopyStream) -> None:
        """Nothing is started yet; pinned memory, twice the bytes of a batch, comes with the first batches."""
        self.stream = stream
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._buffers = deque(_Buffer() for _ in range(_NUM_BUFFERS))
        self._kept: deque[tuple[object, Event]] = deque()

    def batches(self, sources: Iterable[Source], place: Callable[[Source], Batch]) -> Iterator[Batch]:
        """Yield the batch of each of `sources`, in order; the copy of the next one is on its way by then.

        An error of `sources` comes after the batches before it.

        Args:
            sources: What was decoded; iterated in the caller's thread.
            place: Called in the thread, with the stream active: queues what makes a batch on the device of a source.
        """
        under_way: deque[Future[tuple[Batch, Event]]] = deque()
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
        """Copy tensors from the CPU; for `place`.

        Args:
            groups: Tensors of any shape.

        Returns:
            For each group the bytes of its tensors, one after the other, uint8 on the device. All groups share one storage, in
            which each starts at a multiple of 16 bytes.
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
        """Keep `owner`, whose memory the stream still reads, until it has come past what is queued now; for `place`."""
        self._kept.append((owner, self.stream.record()))

    def _place(self, source: Source, place: Callable[[Source], Batch]) -> tuple[Batch, Event]:
        with self.stream.active():
            while self._kept and self._kept[0][1].query():
                self._kept.popleft()
            return place(source), self.stream.record()

    def _take(self, placed: Future[tuple[Batch, Event]]) -> Batch:
        batch, event = placed.result()
        self.stream.hand_over(batch, event)
        return batch


class _Buffer:
    """Pinned memory that is filled again only when its last copy has been made."""

    def __init__(self) -> None:
        self.copied: Event | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def free(self, num_bytes: int, stream: CopyStream) -> Tensor:
        """Return `num_bytes` of the memory, which nothing reads any more."""
        if self.copied is not None:
            self.copied.synchronize()
        if len(self._memory) < num_bytes:
            self._memory = stream.pinned(1 << (num_bytes - 1).bit_length())  # as much as torch takes for it anyway
        return self._memory[:num_bytes]
