import errno
import fcntl
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bitfleet.trainer.checkpoint import format as checkpoint
from bitfleet.trainer.run import files as whole_file
from bitfleet.trainer.run.files import lock_run, write_atomically


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash of the machine between the two would leave an empty file under a good name."""
    done: list[str] = []
    flushed, renamed = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        flushed(descriptor)

    def rename(old: Any, new: Any) -> None:
        assert Path(old).read_text(encoding="utf-8") == "ü"
        done.append(f"rename {Path(old).name} {Path(new).name}")
        renamed(old, new)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    monkeypatch.setattr(whole_file.os, "replace", rename)
    write_atomically(tmp_path / "folder" / "a.json", "ü")
    assert done == ["flush .tmp-a.json", "rename .tmp-a.json a.json", "flush folder"]
    assert (tmp_path / "folder" / "a.json").read_text(encoding="utf-8") == "ü"


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", "old")

    def full(_: int) -> None:
        raise OSError("full")

    monkeypatch.setattr(whole_file.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_full_disk_is_named_and_keeps_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> NoReturn:  # as write(2) and fsync(2) report it, without a name
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_file.os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/config.json'"):
        write_atomically(tmp_path / "config.json", "half")
    assert list(tmp_path.iterdir()) == []


def test_folder_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: object, __: int) -> NoReturn:  # Lustre that is mounted without flock
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ValueError, match=rf"{tmp_path}/run cannot be locked \(Function not implemented\): .*flock"):
        lock_run(tmp_path / "run")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_lock_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=rf"{tmp_path}/run cannot be written \(.*\): choose another --run_dir"):
        lock_run(tmp_path / "run")
