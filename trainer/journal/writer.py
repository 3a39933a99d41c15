"""Writing the flip journal while training goes on: the optimizer tells what flipped, a thread encodes and writes it."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from bitfleet.optim import ShardedOptimizer
from bitfleet.optim.sharding.buckets import Bucket
from bitfleet.trainer.journal.format import (
    FOLDER,
    SIGNS,
    SIGNS_EVERY,
    SKIPPED,
    Bytes,
    Layout,
    Piece,
    encode,
    file_name,
    frame,
    header,
    marker_name,
)
from bitfleet.trainer.ranks.collectives import Ranks, from_first_rank
from bitfleet.trainer.run.files import flush_folder

MAX_STEPS_BEHIND = 16
"""Steps that a slow disk may be behind before training waits for it: what they hold must stay small."""


def open_journal(enabled: bool, run: Path, ranks: Ranks, optimizer: Optimizer) -> "JournalWriter | None":
    """The journal of a run from the present step on, a new part; None without one. Every rank calls this.

    Raises:
        ValueError: no weights of the run travel as bits, or the journal, or the mark of its end, cannot be written.
    """
    folder = run / FOLDER
    if not enabled:
        if problem := from_first_rank(_mark_end(folder, optimizer) if ranks.is_first else ""):
            raise ValueError(problem)
        return None
    if not isinstance(optimizer, ShardedOptimizer) or not any(bucket.binary for bucket in optimizer.buckets):
        raise ValueError(
            "journal.enabled is True, but no weights of this run are kept as bits, whose flips could be written: it needs "
            "--engine.sharding bits, a network with binary weights and a rule that flips them"
        )
    part, problem = 0, ""
    if ranks.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = _next_part(folder)
        except OSError as error:
            problem = str(_unwritable(folder, error))
    part, problem = from_first_rank((part, problem))
    if problem:
        raise ValueError(problem)
    path = folder / file_name(part, optimizer.num_steps, ranks.rank, ranks.world_size)
    return JournalWriter(path, optimizer)


def _mark_end(folder: Path, optimizer: Optimizer) -> str:
    """Note in a journal that is there that the run goes on without it; what is wrong, in words."""
    if folder.is_dir() and isinstance(optimizer, ShardedOptimizer):
        try:
            (folder / marker_name(_next_part(folder), optimizer.num_steps)).touch()
        except OSError as error:
            return (
                f"{folder} cannot be told that the flip journal ends here: {error.strerror or error}; make room, or move that "
                f"folder away"
            )
    return ""


def _next_part(folder: Path) -> int:
    return max((int(path.name[5:].split("-")[0]) for path in folder.glob("part-*.journal")), default=0) + 1


class _Step(NamedTuple):
    step: int
    flips: list[Bytes]
    """Of each binary bucket; none for a step that was skipped."""
    wait: Callable[[], object]
    """Returns when the flips have arrived from the device."""


class JournalWriter:
    """Writes a file of the journal of what `optimizer` flips from now on; one frame a step, in a thread.

    Args:
        path: the file; it is new, and its folder exists.
        optimizer: has binary buckets; it tells this writer what flips until `close`.

    Raises:
        ValueError: the file cannot be made.
    """

    def __init__(self, path: Path, optimizer: ShardedOptimizer) -> None:
        self.path, self._optimizer = path, optimizer
        self._buckets = [bucket for bucket in optimizer.buckets if bucket.binary]
        self._flips: list[Tensor] = []
        self._last_step = begin = optimizer.num_steps
        self._error: Exception | None = None
        self._signs = np.concatenate([bucket.signs().cpu().numpy() for bucket in self._buckets])
        self._bytes_since_signs = 0
        try:
            # Under its name once it can be read: a kill at the start must not leave a file without signs.
            begun = path.with_suffix(".tmp")
            self._file = begun.open("wb")
            self._file.write(header(_layout(optimizer, begin, self._signs.size * 8)))
            self._write_signs(begin)
            self._file.flush()
            os.fsync(self._file.fileno())
            begun.rename(path)
            flush_folder(path.parent)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._queue: queue.Queue[_Step | threading.Event | None] = queue.Queue(MAX_STEPS_BEHIND)
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()
        optimizer.observers.append(self.observe)

    def observe(self, bucket: Bucket, grad: Tensor, flips: Tensor) -> None:
        """Take over `flips` (uint8 [slice_numel / 8], not to be changed any more) of a bucket in the optimizer's current step.

        Raises:
            ValueError: an earlier step could not be written.
        """
        self._check()
        assert bucket is self._buckets[len(self._flips)], "the buckets of a step come in their order"
        self._flips.append(flips)
        if len(self._flips) == len(self._buckets):
            step = self._optimizer.num_steps
            self._skip_to(step - 1)
            self._queue.put(_on_host(step, self._flips))
            self._last_step, self._flips = step, []

    def flush(self) -> None:
        """Bring all steps so far to the disk: a checkpoint must not outlive the flips that led to it.

        Raises:
            ValueError: one could not be written.
        """
        self._skip_to(self._optimizer.num_steps)
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        self._check()

    def close(self) -> None:
        """Flush and end; the optimizer tells no more.

        Raises:
            ValueError: a step could not be written.
        """
        self._optimizer.observers.remove(self.observe)
        try:
            self.flush()
        finally:
            self._queue.put(None)
            self._thread.join()
            with contextlib.suppress(OSError):
                self._file.close()

    def _skip_to(self, step: int) -> None:
        """Steps that nobody told of updated nothing."""
        for skipped in range(self._last_step + 1, step + 1):
            self._queue.put(_Step(skipped, [], bool))
        self._last_step = max(self._last_step, step)

    def _check(self) -> None:
        if isinstance(self._error, OSError):
            raise _unwritable(self.path, self._error) from self._error
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._write(item)
            except Exception as error:  # it is raised in the main thread, which must not wait for this one in vain
                self._error = error
            if isinstance(item, threading.Event):
                item.set()

    def _write(self, item: _Step | threading.Event) -> None:
        if isinstance(item, threading.Event):
            self._file.flush()
            os.fsync(self._file.fileno())
            return
        item.wait()
        if not item.flips:
            self._file.write(frame(SKIPPED, item.step, 0, b""))
            return
        flips = np.concatenate(item.flips)
        self._bytes_since_signs += self._file.write(encode(item.step, flips))
        np.bitwise_xor(self._signs, flips, out=self._signs)
        if self._bytes_since_signs > SIGNS_EVERY * self._signs.size:
            self._write_signs(item.step)
        if self._queue.empty():
            self._file.flush()

    def _write_signs(self, step: int) -> None:
        self._file.write(frame(SIGNS, step, 0, self._signs.tobytes()))
        self._bytes_since_signs = 0


def _on_host(step: int, flips: list[Tensor]) -> _Step:
    if not flips[0].is_cuda:
        return _Step(step, [each.numpy() for each in flips], bool)
    held = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in flips]
    for target, each in zip(held, flips, strict=True):
        target.copy_(each, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return _Step(step, [each.numpy() for each in held], copied.synchronize)


def _layout(optimizer: ShardedOptimizer, begin_step: int, num_weights: int) -> Layout:
    pieces: list[Piece] = []
    shapes: dict[str, list[int]] = {}
    start = 0
    for bucket in optimizer.buckets:
        if bucket.binary:
            shapes |= {segment.name: list(segment.param.shape) for segment in bucket.segments}
            pieces += [Piece(name, first, start + low, high - low) for _, name, first, low, high in bucket.pieces()]
            start += bucket.slice_numel
    return Layout(begin_step, optimizer.rank, optimizer.world_size, num_weights, shapes, pieces)


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"the flip journal {path} cannot be written: {error.strerror or error}; every checkpoint is intact: make room, then "
        f"continue with --resume auto, or without a journal with --journal.enabled False"
    )
