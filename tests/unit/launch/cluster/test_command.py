"""Check the command that `bitfleet launch deepspeed` starts on this machine."""

from collections.abc import Callable, Mapping, Sequence

import pytest

from bitfleet.launch.cluster import command as launch
from bitfleet.launch.cluster.command import read_request, start


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
