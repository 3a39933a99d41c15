"""Saving while training goes on: a copy to host memory, then a thread that writes, hashes and commits."""

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
from bitfleet.trainer.checkpoint.format import (
    FOLDER,
    CheckpointConfig,
    checkpoints,
    file_facts,
    remove,
    superseded,
    write_meta,
)
from bitfleet.trainer.checkpoint.planners import copy_mark
from bitfleet.trainer.checkpoint.tensors import Tensors
from bitfleet.trainer.ranks.collectives import (
    SAVE_TIMEOUT,
    Ranks,
    cpu_group,
    from_first_rank,
    is_lost_peer,
    objects_from_ranks,
)
from bitfleet.trainer.run.files import flush_folder

LAST_SAVE_SECONDS = 20.0
"""How long a rank that fails waits for a save under way; the launcher gives it 30 s."""


class Saver:
    """Writes checkpoints of a run in the background; two saves never overlap. Every rank has one and calls it at the same steps.

    Points of a save, each of which a kill may hit: `begin`, `write_tensors`, `hash_files`, `write_meta`, `commit`, `prune`.

    Args:
        run: run folder.
        config: what to keep.
        ranks: this process's place.
        validation_top1: on rank 0, the accuracies after steps that are known now; for `keep_best`.
    """

    def __init__(
        self, run: Path, config: CheckpointConfig, ranks: Ranks, validation_top1: Callable[[], Mapping[int, float]]
    ) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self.last: Path | None = None
        """The checkpoint that was committed last."""
        self.seconds: float | None = None
        """How long the last save took, from its begin until it was committed."""
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
        write_further: Callable[[Path], None] | None = None,
    ) -> None:
        """Copy `tensors` and start to write them as the checkpoint of `step`.

        Args:
            step: optimizer steps done.
            tensors: from `tensors_to_save`.
            meta: for meta.json; JSON types.
            write_further: writes further files of all ranks below the folder it gets, before this returns (DeepSpeed's own).

        Raises:
            ValueError: the save before this one failed.
        """
        self.flush()
        begun_at = time.monotonic()
        temporary = self.run / FOLDER / f".tmp-{step:08d}"
        self.begin(temporary)
        if write_further:
            write_further(temporary)
        self._copy(tensors)
        # A copy whole: the caller's latest metrics change while the files are written, and meta.json carries its own sha256.
        now = copy.deepcopy(dict(meta))
        self._thread = threading.Thread(
            target=self._work, args=(step, temporary, now, begun_at), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise ValueError if the save that was under way has failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.flush()

    def flush(self) -> None:
        """Wait until the save that is under way is committed.

        Raises:
            ValueError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def let_finish(self) -> None:
        """Give the save that is under way some time, before the process leaves because of something else."""
        if self._thread is not None:
            self._thread.join(LAST_SAVE_SECONDS)

    def _copy(self, tensors: Tensors) -> None:
        """Into memory that is kept from save to save: fresh pages would double the time."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):  # else this would start CUDA in a run on the CPU
            torch.cuda.synchronize()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        held = self._buffers.get(name)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            return held
        fresh = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return copy_mark(tensor, fresh)

    def _work(self, step: int, temporary: Path, meta: dict[str, Any], begun_at: float) -> None:
        committed = temporary.with_name(f"step-{step:08d}")
        problem: str | None = None
        try:
            self.write_tensors(temporary)
            problem = self._commit_on_first_rank(temporary, committed, meta)
        except BaseException as error:  # it is raised in the main thread
            if is_lost_peer(error):
                self._error = error  # the cause is another rank's
                return
            problem = _reason(error)
        if problem is None:
            self.last, self.seconds = committed, time.monotonic() - begun_at
            return
        if self.ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        self._error = ValueError(
            f"the checkpoint of step {step} could not be written below {temporary.parent}: {problem}; "
            f"every checkpoint that was committed before is intact: make room, then continue with --resume auto"
        )

    def _commit_on_first_rank(self, temporary: Path, committed: Path, meta: dict[str, Any]) -> str | None:
        """The same on every rank: None, or why there is no checkpoint."""
        mine = self.hash_files(temporary)
        everyone = objects_from_ranks(mine, self._group)
        problem: str | None = None
        if self.ranks.is_first:
            try:
                meta["files"] = {name: facts for each in everyone for name, facts in sorted(each.items())}
                self.write_meta(temporary, meta)
                self.commit(temporary, committed)
                self.prune()
            except OSError as error:
                problem = _reason(error)
        return from_first_rank(problem, self._group)

    # The points of a save.

    def begin(self, temporary: Path) -> None:
        """Make the folder, on rank 0; the others wait for it."""
        problem: str | None = None
        if self.ranks.is_first:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = _reason(error)
        problem = from_first_rank(problem, cpu_group("control"))
        if problem:
            raise ValueError(f"the checkpoint folder {temporary} cannot be made: {problem}")

    def write_tensors(self, temporary: Path) -> None:
        """Write and flush this rank's file; returns when all ranks have."""
        checkpoint_tensors.write(self._buffers, temporary, self._group)

    def hash_files(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """Name -> facts of the files that this rank wrote; rank 0 also takes those of the engine."""
        files = list(temporary.glob(checkpoint_tensors.shard_files(self.ranks.rank)))
        if self.ranks.is_first:
            files += [path for path in temporary.rglob("*") if path.is_file() and path.parent != temporary]
        return {str(path.relative_to(temporary)): file_facts(path) for path in files}

    def write_meta(self, temporary: Path, meta: Mapping[str, Any]) -> None:
        """Write meta.json and flush everything that is not a rank's own file."""
        write_meta(temporary, meta)
        for path in temporary.rglob("*"):
            if path.is_dir():
                flush_folder(path)
            elif path.parent != temporary:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        flush_folder(temporary)

    def commit(self, temporary: Path, committed: Path) -> None:
        """Give the folder its name: from here on the checkpoint exists."""
        os.rename(temporary, committed)
        flush_folder(committed.parent)

    def prune(self) -> None:
        """Delete what is not kept, and what kills have left behind."""
        found = checkpoints(self.run)
        for path in superseded(found, self.config, self._validation_top1()):
            remove(path)
        for path in (self.run / FOLDER).glob(".*-*"):
            shutil.rmtree(path, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The first cause of a failure, in a line; DCP wraps those of all ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"{_reason(cause)} (rank {rank})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
