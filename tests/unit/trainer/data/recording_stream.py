"""A CopyStream on the CPU: it writes down what is asked of it, and copies as late as a GPU may."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class RecordingStream:
    """Copies are made when somebody waits for them, or at once.

    Args:
        late: nothing is copied before `synchronize` of an event, or `finish`: memory that is filled
            again too early shows.
    """

    device = torch.device("cpu")
    handle = None

    def __init__(self, *, late: bool = False) -> None:
        self.calls: list[str] = []
        """Calls in order, with the number of the copy or event."""
        self.num_copies = self.num_events = self.num_done = 0
        self.threads: set[str] = set()
        """Names of the threads that copied."""
        self._late, self._is_active = late, False
        self._queue: list[Callable[[], object]] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        self._is_active = True
        yield
        self._is_active = False

    def pinned(self, num_bytes: int) -> Tensor:
        self.calls.append(f"pinned {num_bytes}")
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def copy(self, pinned: Tensor) -> Tensor:
        assert self._is_active
        self.threads.add(threading.current_thread().name)
        target = torch.empty_like(pinned)
        self._queue.append(lambda: target.copy_(pinned))
        self.calls.append(f"copy {self.num_copies}")
        self.num_copies += 1
        if not self._late:
            self.finish()
        return target

    def record(self) -> "RecordedEvent":
        self.num_events += 1
        return RecordedEvent(self, len(self._queue))

    def hand_over(self, tensors: Sequence[Tensor], event: "RecordedEvent") -> None:
        self.calls.append(f"hand over {len(tensors)} tensors after copy {event.position - 1}")

    def finish(self, position: int | None = None) -> None:
        """Do what was queued, up to a position."""
        for work in self._queue[self.num_done : position]:
            work()
        self.num_done = len(self._queue) if position is None else max(position, self.num_done)


class RecordedEvent:
    """A point in the queue of a RecordingStream."""

    def __init__(self, stream: RecordingStream, position: int) -> None:
        self._stream, self.position = stream, position

    def query(self) -> bool:
        return self._stream.num_done >= self.position

    def synchronize(self) -> None:
        self._stream.calls.append(f"wait for copy {self.position - 1}")
        self._stream.finish(self.position)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 10 s")
