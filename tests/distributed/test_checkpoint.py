"""Checkpoints that several ranks write and read; what is checked is in checkpoint_job.py."""

from pathlib import Path

import pytest

from tests.conftest import BIN, free_port, run_command


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_writes_its_chunks_and_reads_any(world_size: int, tmp_path: Path) -> None:
    launcher = [BIN / "torchrun", "--nproc_per_node", str(world_size), "--master_port", str(free_port())]
    done = run_command([*launcher, "-m", "tests.distributed.checkpoint_job", tmp_path])
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("rank passed") == world_size
