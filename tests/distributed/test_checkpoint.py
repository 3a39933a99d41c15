"""Checkpoints that several ranks write and read; what is checked is in checkpoint_job.py."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_writes_its_chunks_and_reads_any(world_size: int, tmp_path: Path) -> None:
    done = run_ranks(world_size, "-m", "tests.distributed.checkpoint_job", tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("rank passed") == world_size
