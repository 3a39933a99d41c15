"""Run these tests on every rank of a job: `torchrun --nproc_per_node 3 -m pytest -x
tests/distributed/on_ranks`.

Every rank runs the same tests in the same order and stops at its first failure, whose report names
the rank. `make test` starts them from tests/distributed/test_on_ranks.py.
"""

import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bitfleet.optim import ShardedOptimizer

PLACE = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
_exit_code = pytest.StashKey[int]()
_passed: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--defers", action="store_true", help="optimizers do not wait for the device, as on a GPU")


@pytest.fixture(scope="session", autouse=True)
def cache() -> None:
    """Use the cache of the test that started the ranks, so that kernels are compiled once."""


@pytest.fixture(scope="session", autouse=True)
def process_group(request: pytest.FixtureRequest) -> Iterator[None]:
    """Join the ranks."""
    torch.set_num_threads(1)
    if request.config.getoption("--defers"):
        assert ShardedOptimizer.__init__.__kwdefaults__
        ShardedOptimizer.__init__.__kwdefaults__["defers"] = True
    dist.init_process_group("gloo")
    yield
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is the same on every rank."""
    with tempfile.TemporaryDirectory() as own:  # not tmp_path: each rank would tidy up those of the others
        shared = [own]
        dist.broadcast_object_list(shared)
        yield Path(shared[0])
        dist.barrier()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    report.location = (*report.location[:2], f"{report.location[2]} on {PLACE}")
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _passed.extend([report.nodeid] if report.when == "call" and report.passed else [])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_exit_code] = int(exitstatus)
    print(f"\n{PLACE}: {len(_passed)} passed", flush=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave at once: gloo's destructors abort a process now and then, also after its group is
    destroyed."""
    sys.stdout.flush()
    os._exit(config.stash.get(_exit_code, 1))
