"""Save in the background: copy to host memory, then write, hash and commit in a thread."""

import copy
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.checkpoint.format import FOLDER, checkpoints, file_facts, remove, superseded, write_meta
from bitfleet.trainer.checkpoint.tensors import Tensors, copy_mark
from bitfleet.trainer.ranks.collectives import (
    SAVE_TIMEOUT,
    Ranks,
    all_gather_objects,
    broadcast_object,
    cpu_group,
    is_lost_peer,
)
from bitfleet.trainer.run.files import flush_folder

LAST_SAVE_SECONDS = 20.0
"""Seconds that a failing rank waits for a save in progress; DeepSpeed kills it after 30."""


class Saver:
    """Write the checkpoints of a run in a thread, one at a time; every rank has one.

    A save goes through `begin`, `write_tensors`, `hash_files`, `write_meta`, `commit` and `prune`;
    a kill at any point leaves the earlier checkpoints valid (tests/faults).

    Args:
        run: run folder.
        config: which checkpoints to keep.
        ranks: rank and world size.
        validation_top1: returns, on rank 0, step -> accuracy known so far; for `keep_best`.
    """

    def __init__(
        self, run: Path, config: CheckpointConfig, ranks: Ranks, validation_top1: Callable[[], Mapping[int, float]]
    ) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self.last: Path | None = None
        """The last committed checkpoint."""
        self.seconds: float | None = None
        """Duration of the last save, from `begin` until it was committed."""
        self._validation_top1 = validation_top1
        self._group = cpu_group("save", SAVE_TIMEOUT)
        self._buffers: Tensors = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Tensors,
        meta: Mapping[str, Any],
        write_more: Callable[[Path], None] | None = None,
    ) -> None:
        """Copy `tensors` and start to write them as the checkpoint of `step`.

        Args:
            step: optimizer steps done.
            tensors: from `tensors_to_save`.
            meta: content of meta.json except "files"; JSON types.
            write_more: writes more files of all ranks below the given folder before this returns
                (DeepSpeed's).

        Raises:
            ValueError: the previous save failed.
        """
        self.flush()
        start = time.monotonic()
        temporary = self.run / FOLDER / f".tmp-{step:08d}"
        self.begin(temporary)
        if write_more:
            write_more(temporary)
        self._copy(tensors)
        # A deep copy: the caller's latest metrics change while the files are written.
        snapshot = copy.deepcopy(dict(meta))
        self._thread = threading.Thread(
            target=self._work, args=(step, temporary, snapshot, start), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise ValueError if the save in progress has failed; do not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.flush()

    def flush(self) -> None:
        """Wait until the save in progress is committed.

        Raises:
            ValueError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait_briefly(self) -> None:
        """Give the save in progress some time before the process exits for another reason."""
        if self._thread is not None:
            self._thread.join(LAST_SAVE_SECONDS)

    def _copy(self, tensors: Tensors) -> None:
        """Copy into buffers that are reused by every save: new pages would double the time."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):  # else it would start CUDA
            torch.cuda.synchronize()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
            return buffer
        return copy_mark(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda))

    def _work(self, step: int, temporary: Path, meta: dict[str, Any], start: float) -> None:
        committed = temporary.with_name(f"step-{step:08d}")
        problem: str | None = None
        try:
            self.write_tensors(temporary)
            problem = self._commit_on_first_rank(temporary, committed, meta)
        except BaseException as error:  # raised in the main thread
            if is_lost_peer(error):
                self._error = error  # the cause is on another rank
                return
            problem = _reason(error)
        if problem is None:
            self.last, self.seconds = committed, time.monotonic() - start
            return
        if self.ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self._error = ValueError(
            f"the checkpoint of step {step} could not be written below {temporary.parent}: {problem}; "
            f"all earlier checkpoints are intact: free some space, then continue with --resume auto"
        )

    def _commit_on_first_rank(self, temporary: Path, committed: Path, meta: dict[str, Any]) -> str | None:
        """Hash, commit and prune; return None, or the problem, the same on every rank."""
        hashed = all_gather_objects(self.hash_files(temporary), self._group)
        problem: str | None = None
        if self.ranks.is_main:
            try:
                files = {name: entry for of_rank in hashed for name, entry in sorted(of_rank.items())}
                self.write_meta(temporary, {**meta, "files": files})
                self.commit(temporary, committed)
                self.prune()
            except OSError as error:
                problem = _reason(error)
        return broadcast_object(problem, self._group)

    def begin(self, temporary: Path) -> None:
        """Create the folder on rank 0; the others wait for it."""
        problem: str | None = None
        if self.ranks.is_main:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = _reason(error)
        problem = broadcast_object(problem, cpu_group("control"))
        if problem:
            raise ValueError(f"the checkpoint folder {temporary} cannot be created: {problem}")

    def write_tensors(self, temporary: Path) -> None:
        """Write and flush this rank's file; return when all ranks have done so."""
        checkpoint_tensors.write(self._buffers, temporary, self._group)

    def hash_files(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """Return name -> size and hash of this rank's files; on rank 0 also of the engine's."""
        files = list(temporary.glob(checkpoint_tensors.shard_files(self.ranks.rank)))
        if self.ranks.is_main:
            files += [path for path in temporary.rglob("*") if path.is_file() and path.parent != temporary]
        return {str(path.relative_to(temporary)): file_facts(path) for path in files}

    def write_meta(self, temporary: Path, meta: Mapping[str, Any]) -> None:
        """Write meta.json, and flush all folders and the engine's files."""
        write_meta(temporary, meta)
        for path in temporary.rglob("*"):
            if path.is_dir():
                flush_folder(path)
            elif path.parent != temporary:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        flush_folder(temporary)

    def commit(self, temporary: Path, committed: Path) -> None:
        """Rename the folder: from now on the checkpoint exists."""
        os.rename(temporary, committed)
        flush_folder(committed.parent)

    def prune(self) -> None:
        """Delete superseded checkpoints, and the remains of killed saves."""
        for path in superseded(checkpoints(self.run), self.config, self._validation_top1()):
            remove(path)
        for path in (self.run / FOLDER).glob(".*-*"):
            shutil.rmtree(path, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """Describe the first cause of a failure in one line; DCP wraps those of all ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"{_reason(cause)} (rank {rank})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
