import os
from pathlib import Path
from typing import Any

import pytest

from bitfleet.trainer.checkpoint import format as checkpoint
from bitfleet.trainer.run import files as whole_file
from bitfleet.trainer.run.files import write_atomically


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
