"""Check the command that `bitfleet launch deepspeed` starts on this machine."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from bitfleet.launch.cluster import command as launch
from bitfleet.launch.cluster.command import read_request, start
from bitfleet.launch.cluster.launchers import tool


@pytest.mark.parametrize(
    ("visible", "gpus", "by_number"),
    [
        (None, 1, True),  # without the number DeepSpeed would start a rank on each GPU there is
        ("", 1, True),
        ("3", 1, False),
        ("4,5", 2, False),
        ("4,5", 1, True),
    ],
)
def test_as_many_ranks_as_asked_for(
    visible: str | None, gpus: int, by_number: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Sequence[str]] = []

    def supervised(words: Sequence[str], environ: Mapping[str, str], ask: Callable[..., None]) -> int:
        started.append(words)
        return 0

    monkeypatch.setattr(launch, "supervise", supervised)
    monkeypatch.setattr(launch, "gpus_here", lambda otherwise=1: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert start(*read_request(["--gpus", str(gpus), "--config", "fashion_quickstart"], "deepspeed")) == 0
    assert ("--num_accelerators" in started[0]) is by_number
    if by_number:
        assert started[0][started[0].index("--num_accelerators") + 1] == str(gpus)


def test_command_of_deepspeed_is_found_on_path_or_missed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install --user` writes scripts into a folder that is not Python's."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python3"))
    monkeypatch.setenv("PATH", str(tmp_path / "local"))
    request = read_request(["--gpus", "1", "--config", "fashion_quickstart"], "deepspeed")
    with pytest.raises(ValueError, match=rf"DeepSpeed's command is not at {tmp_path}/bin/deepspeed, .* PATH"):
        start(*request)
    script = tmp_path / "local" / "deepspeed"
    script.parent.mkdir()
    script.touch(0o755)
    assert tool("deepspeed") == str(script)
    assert tool("python") == str(tmp_path / "bin" / "python3")  # a system may have no `python`
