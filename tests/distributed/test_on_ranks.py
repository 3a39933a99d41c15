"""Run the tests of on_ranks/ on every rank of real jobs."""

import re

import pytest

from tests.conftest import run_ranks

# A fork has imported modules that pytest would rewrite.
PYTEST = "-m pytest -x -q --no-header -p no:cacheprovider -W ignore::pytest.PytestAssertRewriteWarning".split()


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, []),
        (2, []),
        (3, []),
        (2, ["--defers"]),
        *(pytest.param(n, options, marks=pytest.mark.slow) for n in (4, 8) for options in ([], ["--defers"])),
    ],
)
def test_on_ranks(world_size: int, options: list[str]) -> None:
    done = run_ranks(world_size, *PYTEST, "tests/distributed/on_ranks", *options, timeout=600)
    assert done.returncode == 0, done.stdout
    counts = dict(re.findall(rf"rank (\d) of {world_size}: (\d+) passed", done.stdout))
    assert sorted(counts) == [str(rank) for rank in range(world_size)]
    assert int(counts["0"]) > 20
    assert set(counts.values()) == {counts["0"]}
