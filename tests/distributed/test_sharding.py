"""The sharded optimizer in real processes; what is checked is in sharding_job.py."""

from pathlib import Path

import pytest

from tests.conftest import BIN, free_port, run_command


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, []),
        (2, []),
        (3, []),
        (2, ["defers"]),
        *(pytest.param(n, options, marks=pytest.mark.slow) for n in (4, 8) for options in ([], ["defers"])),
    ],
)
def test_sharded_is_unsharded_bit_for_bit(world_size: int, options: list[str], tmp_path: Path) -> None:
    launcher = [BIN / "torchrun", "--nproc_per_node", str(world_size), "--master_port", str(free_port())]
    done = run_command([*launcher, "-m", "tests.distributed.sharding_job", tmp_path, *options], timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("rank passed") == world_size
