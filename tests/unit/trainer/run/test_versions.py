import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bitfleet.trainer.run import versions
from bitfleet.trainer.run.versions import git_revision, hardware


def test_machine_is_described_in_json_types() -> None:
    found = json.loads(json.dumps(hardware()))
    assert found["processor"]
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] > 2**28
    assert isinstance(found["gpus"], list)


def test_gpus_are_named_only_where_the_run_uses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert hardware()["gpus"] == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert hardware()["gpus"] == ["GPU 0", "GPU 1"]


def test_revision_is_not_that_of_the_repository_around_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".venv" / "bitfleet" / "versions.py"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / ".gitignore").write_text(".venv\n")

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    git("add", ".gitignore")
    git("commit", "-q", "-m", "a project that uses bitfleet")
    monkeypatch.setattr(versions, "__file__", str(file))
    assert git_revision() is None
    git("add", "-f", str(file))
    git("commit", "-q", "-m", "a checkout")
    assert len(git_revision() or "") == 40
