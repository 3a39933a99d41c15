"""Write the flip journal: the optimizer reports flips, a thread encodes and writes them."""

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
from bitfleet.trainer.ranks.collectives import Ranks, broadcast_object
from bitfleet.trainer.run.files import flush_folder

MAX_STEPS_BEHIND = 16
"""Steps that a slow disk may be behind before training waits, to bound their memory."""


def open_journal(enabled: bool, run: Path, ranks: Ranks, optimizer: Optimizer) -> "JournalWriter | None":
    """Start a new part of a run's journal at the current step; every rank calls this.

    If disabled, return None and mark the end of a journal that exists.

    Raises:
        ValueError: the run keeps no weights as bits, or the journal or its end mark cannot be
            written.
    """
    folder = run / FOLDER
    if not enabled:
        if problem := broadcast_object(_mark_end(folder, optimizer) if ranks.is_main else ""):
            raise ValueError(problem)
        return None
    if not isinstance(optimizer, ShardedOptimizer) or not any(bucket.binary for bucket in optimizer.buckets):
        raise ValueError(
            "journal.enabled is True, but this run keeps no weights as bits: the journal needs "
            "--engine.sharding bits, a network with binary weights and a rule that flips them"
        )
    part, problem = 0, ""
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = _next_part(folder)
        except OSError as error:
            problem = str(_unwritable(folder, error))
    part, problem = broadcast_object((part, problem))
    if problem:
        raise ValueError(problem)
    path = folder / file_name(part, optimizer.num_steps, ranks.rank, ranks.world_size)
    return JournalWriter(path, optimizer)


def _mark_end(folder: Path, optimizer: Optimizer) -> str:
    """Mark an existing journal as ended here; return what went wrong, or ""."""
    if folder.is_dir() and isinstance(optimizer, ShardedOptimizer):
        try:
            (folder / marker_name(_next_part(folder), optimizer.num_steps)).touch()
        except OSError as error:
            return (
                f"cannot mark the end of the flip journal in {folder}: {error.strerror or error}; free some "
                f"space, or move that folder away"
            )
    return ""


def _next_part(folder: Path) -> int:
    return max((int(path.name[5:].split("-")[0]) for path in folder.glob("part-*.journal")), default=0) + 1


class _Step(NamedTuple):
    step: int
    flips: list[Bytes]
    """One array per binary bucket; empty for a skipped step."""
    updated: bool | Tensor
    """False for a skipped step, which may have flips of 0; bool [] on the CPU."""
    wait: Callable[[], object]
    """Wait until both have arrived from the device."""


class JournalWriter:
    """Write the flips of `optimizer` from now on to a file, one frame per step, in a thread.

    Args:
        path: a new file in an existing folder.
        optimizer: with binary buckets; it reports flips to this writer until `close`.

    Raises:
        ValueError: the file cannot be created.
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
            # Renamed when it can be read: a kill at the start must not leave a file without signs.
            temporary = path.with_suffix(".tmp")
            self._file = temporary.open("wb")
            self._file.write(header(_layout(optimizer, begin, self._signs.size * 8)))
            self._write_signs(begin)
            self._file.flush()
            os.fsync(self._file.fileno())
            temporary.rename(path)
            flush_folder(path.parent)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._queue: queue.Queue[_Step | threading.Event | None] = queue.Queue(MAX_STEPS_BEHIND)
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()
        optimizer.observers.append(self.observe)

    def observe(self, bucket: Bucket, grad: Tensor, flips: Tensor) -> None:
        """Receive the `flips`, uint8 [slice_numel / 8], of a bucket in the current step.

        Raises:
            ValueError: an earlier step could not be written.
        """
        self._check()
        assert bucket is self._buckets[len(self._flips)], "the buckets of a step come in their order"
        self._flips.append(flips)
        if len(self._flips) == len(self._buckets):
            step = self._optimizer.num_steps
            self._skip_to(step - 1)
            self._queue.put(_on_host(step, self._flips, self._optimizer.updated))
            self._last_step, self._flips = step, []

    def flush(self) -> None:
        """Write all steps so far to disk: a checkpoint must not outlive the flips before it.

        Raises:
            ValueError: a step could not be written.
        """
        self._skip_to(self._optimizer.num_steps)
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        self._check()

    def close(self) -> None:
        """Flush, close the file and detach from the optimizer.

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
        """Record steps without a report as skipped: they updated nothing."""
        for skipped in range(self._last_step + 1, step + 1):
            self._queue.put(_Step(skipped, [], False, bool))
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
            except Exception as error:  # raised in the main thread
                self._error = error
            if isinstance(item, threading.Event):
                item.set()

    def _write(self, item: _Step | threading.Event) -> None:
        if isinstance(item, threading.Event):
            self._file.flush()
            os.fsync(self._file.fileno())
            return
        item.wait()
        if not item.updated:
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


def _on_host(step: int, flips: list[Tensor], updated: bool | Tensor) -> _Step:
    if not flips[0].is_cuda:
        return _Step(step, [each.numpy() for each in flips], updated, bool)
    sources = [*flips, *([updated] if isinstance(updated, Tensor) else [])]
    pinned = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in sources]
    for target, source in zip(pinned, sources, strict=True):
        target.copy_(source, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    updated = pinned.pop() if isinstance(updated, Tensor) else updated
    return _Step(step, [each.numpy() for each in pinned], updated, copied.synchronize)


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
        f"the flip journal {path} cannot be written: {error.strerror or error}; every checkpoint is intact: free some "
        f"space, then continue with --resume auto, or without a journal with --journal.enabled False"
    )
