"""A run on the device has the same bits when it is stopped and resumed, and when it is repeated."""

import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import run_command
from tests.integration.runs import assert_same_bits, final_tensors

pytestmark = pytest.mark.gpu


@pytest.fixture
def command(device: torch.device, is_dry: bool, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the command of a run of the small Bi-Real Net on one rank."""
    for interface in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(interface, "lo")  # a machine without a network has no other
    config = tiny if is_dry else ["--config", "fashion_quickstart"]
    where = ["--device", "cpu" if device.type == "cpu" else "gpu", "--data.loader", "torch"]
    return [sys.executable, "-m", "bitfleet.launch.train", *config, *where]


def test_stopped_and_repeated_runs_have_the_bits_of_the_whole_one(
    command: list[str], is_dry: bool, tmp_path: Path
) -> None:
    half, whole = (3, 6) if is_dry else (46, 92)
    for run, last, *further in (
        ("whole", whole),
        ("again", whole),
        ("stopped", half),
        ("stopped", whole, "--resume", "auto"),
    ):
        options = ["--run_dir", str(tmp_path / str(run)), "--stop_after_steps", str(last), *map(str, further)]
        done = run_command([*command, *options], timeout=300)
        assert done.returncode == 0, done.stdout
    expected = final_tensors(tmp_path / "whole", whole)
    assert any(name.startswith("optim.exp_avg_sq") for name in expected)
    assert_same_bits(expected, final_tensors(tmp_path / "again", whole))
    assert_same_bits(expected, final_tensors(tmp_path / "stopped", whole))
