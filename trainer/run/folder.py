"""The folder of a run: which one it is, and what is written into it once.

config.json     resolved configuration, git revision, versions, ranks, machine
checkpoints/    step-00001234/, one folder a checkpoint
tensorboard/    event files
metrics.jsonl   one line a logging step or validation
"""

import datetime
import json
from pathlib import Path
from typing import IO, Any, NamedTuple

from bitfleet.trainer.checkpoint.format import FOLDER, is_checkpoint, latest_checkpoint
from bitfleet.trainer.config import TrainConfig, from_dict, to_dict
from bitfleet.trainer.run.files import lock_run, write_atomically
from bitfleet.trainer.run.strict_json import to_json
from bitfleet.trainer.run.versions import git_revision, hardware, versions

CONFIG = "config.json"


class RunFolder(NamedTuple):
    """Where a run writes, and the checkpoint it continues from (None: from the start)."""

    path: Path
    checkpoint: Path | None
    branches: bool = False
    """The checkpoint is another run's, or was named by the user: no other one will do."""


def choose_run_folder(config: TrainConfig) -> RunFolder:
    """Find the run to continue, or name a new one. Nothing is written.

    Raises:
        ValueError: a path to resume holds no run, or a new run would go into the folder of another.
    """
    if config.resume and config.resume != "auto":
        return _continue_or_branch(Path(config.resume), config.run_dir)
    if config.resume == "auto":
        below = config.output / config.name
        found = [config.run_dir] if config.run_dir else sorted(below.iterdir(), reverse=True) if below.is_dir() else []
        for path in found:
            if (checkpoint := latest_checkpoint(path)) is not None:
                return RunFolder(path, checkpoint)
    if config.run_dir:
        if config.resume is None and (config.run_dir / CONFIG).exists():
            raise ValueError(
                f"{config.run_dir} already holds a run: continue it with --resume auto, or choose another --run_dir"
            )
        return RunFolder(config.run_dir, None)
    return RunFolder(_new_folder(config.output / config.name), None)


def _new_folder(below: Path) -> Path:
    """A name that comes after all there are, also when another run began in the same second or the clock was set back."""
    path = started = below / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    newest = max(below.iterdir(), default=started) if below.is_dir() else started
    if newest > started or path.exists():
        base = newest.name.split("__")[0]
        for number in range(2, 1000):
            path = below / f"{base}__{number:03d}"
            if not path.exists() and path > newest:
                break
    return path


def _continue_or_branch(path: Path, run_dir: Path | None) -> RunFolder:
    found = _find_run(path)
    if run_dir is not None and run_dir.resolve() != found.path.resolve():
        if (run_dir / CONFIG).exists():
            raise ValueError(
                f"{run_dir} already holds a run: choose another --run_dir to branch from {found.checkpoint}"
            )
        return RunFolder(run_dir, found.checkpoint, branches=True)
    newest = latest_checkpoint(found.path)
    assert newest is not None
    if found.checkpoint is not None and found.checkpoint.name != newest.name:
        raise ValueError(
            f"{found.checkpoint} is not the newest checkpoint of its run ({newest.name} is), and a run is never overwritten: "
            f"branch into a folder of its own with --run_dir"
        )
    return found


def checkpoint_disk(folder: Path) -> Path:
    """Return the nearest folder that exists, from that of the checkpoints of the run `folder` upwards: it is on their disk."""
    path = (folder / FOLDER).absolute()
    while not path.is_dir():
        path = path.parent
    return path


def planned_folder(config: TrainConfig) -> Path:
    """Return where a run of `config` will write, as far as that is known before it starts; nothing is made."""
    if config.run_dir is None and config.resume and config.resume != "auto":
        path = Path(config.resume)
        return path.resolve().parents[1] if is_checkpoint(path) else path
    return config.run_dir or config.output / config.name


def _find_run(path: Path) -> RunFolder:
    if is_checkpoint(path):
        return RunFolder(path.resolve().parents[1], path.resolve())
    if not (path / CONFIG).exists():
        raise ValueError(
            f"there is nothing to resume at {path}: expected a run folder (with {CONFIG}) or one of its checkpoints"
        )
    if (checkpoint := latest_checkpoint(path)) is None:
        raise ValueError(f"the run {path} has no complete checkpoint to resume from")
    return RunFolder(path, checkpoint)


def take_folder(folder: RunFolder) -> IO[str]:
    """Lock the folder for this process; it is made if need be.

    Raises:
        ValueError: another run has it, or has used it since it was chosen.
    """
    lock = lock_run(folder.path)
    if (folder.checkpoint is None or folder.branches) and latest_checkpoint(folder.path):
        lock.close()
        raise ValueError(f"another run has used {folder.path} meanwhile: start this one again")
    return lock


def write_config(path: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Write config.json: the resolved configuration, `facts`, git revision, versions and the machine."""
    facts = {**facts, "git": git_revision(), "versions": versions(), "hardware": hardware()}
    content = {"config": to_dict(config), **facts}
    write_atomically(path / CONFIG, to_json(content, indent=2) + "\n")


def read_config(path: Path) -> TrainConfig:
    """The configuration of the run at `path`.

    Raises:
        ValueError: there is no run, or its file is damaged.
    """
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"{path} is not a run folder: there is no {CONFIG} in it")
    try:
        read = json.loads(file.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: expected the JSON that a run writes at its start ({error})") from error
    return from_dict(read)
