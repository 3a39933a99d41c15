"""Choose the folder of a run, and the checkpoint that it resumes from."""

import datetime
import re
from pathlib import Path
from typing import IO, NamedTuple

from bitfleet.trainer.checkpoint.format import DAMAGED, FOLDER, absolute, is_checkpoint, latest_checkpoint
from bitfleet.trainer.run.files import lock_run
from bitfleet.trainer.run.folder import CONFIG

DATE = "%Y-%m-%d_%H-%M-%S"
DATED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(__\d{3})?")
"""Names of the folders that runs without --run_dir get."""


class RunFolder(NamedTuple):
    """Where a run writes, and the checkpoint it resumes from (None: it starts from step 0)."""

    path: Path
    checkpoint: Path | None
    branches: bool = False
    """The checkpoint is another run's: never fall back to an older one."""


def choose_run_folder(runs: Path, run_dir: Path | None, resume: str | None) -> RunFolder:
    """Find the run to resume, or name a new one, without writing anything.

    Args:
        runs: folder of all runs of this configuration (`output`/`name`).
        run_dir: the folder that the user chose, if any.
        resume: None, "auto", or a path of a run or checkpoint.

    Raises:
        ValueError: a path to resume holds no run, all checkpoints of the run are damaged, or a new
            run would write into the folder of another.
    """
    if resume and resume != "auto":
        return _resume_or_branch(Path(resume), run_dir)
    if resume == "auto" and (path := run_dir or _newest_run(runs)) is not None:
        checkpoint = latest_checkpoint(path)
        if checkpoint is None and (damaged := sorted((path / FOLDER).glob(DAMAGED + "*"))):
            raise ValueError(f"the run {path} has no intact checkpoint, only {damaged[-1].name}: {start_over(path)}")
        return RunFolder(path, checkpoint)
    if run_dir and (run_dir / CONFIG).exists():
        raise ValueError(f"{run_dir} already holds a run: continue it with --resume auto, or choose another --run_dir")
    return RunFolder(run_dir or _new_folder(runs), None)


def start_over(run: Path) -> str:
    """Say what to do about a run whose checkpoints are all damaged."""
    return f"start over with another --run_dir, or move {run} away"


def _newest_run(runs: Path) -> Path | None:
    """Return the newest folder below `runs` that holds a run, with or without a checkpoint."""
    started = [path for path in runs.iterdir() if (path / CONFIG).is_file()] if runs.is_dir() else []
    return max(started, key=_date, default=None)


def _date(run: Path) -> str:
    """Return the date of a run: its name where that is one, which neither a copy nor a clock that
    was set back changes; else that of its last start."""
    if DATED.fullmatch(run.name):
        return run.name
    return datetime.datetime.fromtimestamp((run / CONFIG).stat().st_mtime).strftime(DATE)


def _new_folder(runs: Path) -> Path:
    """Name a folder that sorts after all others with a date, also after the clock was set back."""
    path = now = runs / datetime.datetime.now().strftime(DATE)
    dated = [path for path in runs.iterdir() if DATED.fullmatch(path.name)] if runs.is_dir() else []
    newest = max(dated, default=now)
    if newest > now or path.exists():
        base = newest.name.split("__")[0]
        for index in range(2, 1000):
            path = runs / f"{base}__{index:03d}"
            if not path.exists() and path > newest:
                break
    return path


def _resume_or_branch(path: Path, run_dir: Path | None) -> RunFolder:
    run = _find_run(path)
    if run_dir is not None and run_dir.resolve() != run.path.resolve():
        if (run_dir / CONFIG).exists():
            raise ValueError(f"{run_dir} already holds a run: choose another --run_dir to branch from {run.checkpoint}")
        return RunFolder(run_dir, run.checkpoint, branches=True)
    newest = latest_checkpoint(run.path)
    if newest is None:
        raise ValueError(
            f"{run.checkpoint} is not in the folder {FOLDER} of a run: pass a folder for the run that continues it as "
            "--run_dir"
        )
    if run.checkpoint is not None and run.checkpoint.name != newest.name:
        raise ValueError(
            f"{run.checkpoint} is not the newest checkpoint of its run ({newest.name} is), and a run is never "
            f"overwritten: branch into another folder with --run_dir"
        )
    return run


def _find_run(path: Path) -> RunFolder:
    if is_checkpoint(path):
        path = absolute(path)
        return RunFolder(path.parents[1], path)
    if not (path / CONFIG).exists():
        raise ValueError(
            f"there is nothing to resume at {path}: expected a run folder (with {CONFIG}) or one of its checkpoints"
        )
    if (checkpoint := latest_checkpoint(path)) is None:
        raise ValueError(f"the run {path} has no complete checkpoint to resume from")
    return RunFolder(path, checkpoint)


def planned_folder(runs: Path, run_dir: Path | None, resume: str | None) -> Path:
    """Return where a run will write, as far as known; arguments as in `choose_run_folder`."""
    if run_dir is None and resume and resume != "auto":
        path = Path(resume)
        return absolute(path).parents[1] if is_checkpoint(path) else path
    return run_dir or runs


def create_and_lock(folder: RunFolder) -> IO[str]:
    """Create the folder if missing and lock it for this process.

    Raises:
        ValueError: another run holds it, or has used it since it was chosen.
    """
    lock = lock_run(folder.path)
    if (folder.checkpoint is None or folder.branches) and latest_checkpoint(folder.path):
        lock.close()
        raise ValueError(f"another run has used {folder.path} meanwhile: start this one again")
    return lock


def checkpoint_disk(run: Path) -> Path:
    """Return the nearest existing folder at or above a run's checkpoints: it is on their disk."""
    path = (run / FOLDER).absolute()
    while not path.is_dir():
        path = path.parent
    return path
