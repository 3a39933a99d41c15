"""Share a lab per module, and the run on one host that is the reference."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.integration.runs import NUM_STEPS, TRAIN
from tests.multinode.host_job import HostJob
from tests.multinode.lab import Lab, lab, missing


@pytest.fixture(scope="session")
def can_have_hosts() -> None:
    if reason := missing():
        pytest.skip(f"NO TEST ON SEVERAL HOSTS: {reason}")


@pytest.fixture(scope="module")
def _two_hosts(can_have_hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab") / "lab") as hosts:
        yield hosts


@pytest.fixture
def two_hosts(_two_hosts: Lab) -> Iterator[Lab]:
    """The lab without processes that a failed test has left."""
    yield _two_hosts
    _two_hosts.clear(HostJob.SCRIPT.name)


@pytest.fixture
def four_hosts(can_have_hosts: None, tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path / "lab", num_hosts=4) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def options(tiny: list[str]) -> list[str]:
    """Options of a run of four replicas: the same bits on any number of ranks that divides them."""
    more = f"--num_replicas 4 --num_threads 1 --resume auto --checkpoint.every_steps 3 --stop_after_steps {NUM_STEPS}"
    return [*tiny, *more.split()]


@pytest.fixture(scope="session")
def one_host(
    can_have_hosts: None, deepspeed: Launch, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The undisturbed run on four ranks of one host."""
    run = tmp_path_factory.mktemp("one_host") / "run"
    done = deepspeed(4, TRAIN, *options, "--run_dir", run)
    assert done.returncode == 0, done.stdout
    return run
