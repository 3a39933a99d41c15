"""Share between all tests: a cache outside the home directory, tiny images, and ways to start
programs and jobs."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from bitfleet.launch.job import free_port
from tests.fork_server import ForkedProcess, ForkServer

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]
HANGS = 300.0
"""Seconds after which a process hangs, also on a machine that is busy with other things."""
LONG_FILES = (
    "test_on_ranks.py",
    "test_faults.py",
    "test_train.py",
    "test_step_graph.py",
    "test_compilation.py",
    "test_memory.py",
)
"""Files that take longest; workers start with them, in this order, so that none is left alone with
one at the end."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep bitfleet from writing to the home directory."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFLEET_CACHE", str(path))
        yield path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run LONG_FILES first, then whole jobs and units as they were collected."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def write_images(root: Path, *, num_classes: int, train: int, val: int, size: int = 28) -> Path:
    """Write class folders of random images; their brightness depends on the class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(num_classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 100, (size, size), dtype=np.uint8) + np.uint8(label * 150 // num_classes)
                Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes, 200 training and 28 validation images: 12 steps of 16 images per epoch."""
    return write_images(tmp_path_factory.mktemp("tiny") / "images", num_classes=4, train=50, val=7)


@pytest.fixture(scope="session")
def tiny(tiny_images: Path) -> list[str]:
    """Options for a run of seconds on `tiny_images`."""
    return (
        f"--config fashion_quickstart --data.root {tiny_images} --model.num_classes 4 --global_batch_size 16 --epochs "
        "3 --metrics.every_steps 5 --model.width 16"
    ).split()


def job_environment(**further: str) -> dict[str, str]:
    """Return the variables of a process that a test starts: those of the test, but no rank."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "PATH": f"{BIN}:{os.environ['PATH']}"}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(key, None)
    return environment | further


def run_command(
    command: Sequence[str | Path], *, timeout: float = HANGS, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in its own process group; one that hangs is killed and fails the
    test."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=job_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return finish(process, command, timeout)


def finish(
    process: subprocess.Popen[str] | ForkedProcess, command: Sequence[str | Path], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Wait for a process that leads its group."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=10)
        pytest.fail(f"still running after {timeout} s: {command}\n{output}")
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@functools.cache
def fork_server() -> ForkServer:
    """Return the fork server of this pytest process."""
    return ForkServer(job_environment(), REPOSITORY)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip what is left after $BITFLEET_TESTS_END, seconds since 1970: CI has an hour, on any
    machine."""
    if time.time() > float(os.environ.get("BITFLEET_TESTS_END", "inf")):
        pytest.skip("the time that $BITFLEET_TESTS_END allows is over")


def pytest_unconfigure() -> None:
    """End the fork server, if a test has started it."""
    if fork_server.cache_info().currsize:
        fork_server().close()


def start_python(
    *arguments: str | Path, num_ranks: int | None = None, cwd: Path = REPOSITORY, **variables: str
) -> ForkedProcess:
    """Fork `python ARGUMENTS`, or its ranks as under DeepSpeed's launcher; see fork_server.py for
    what is real.

    Args:
        arguments: a script, or "-m" and a module, then the program's own.
        num_ranks: None for one process without a launcher.
        cwd: working directory.
        variables: further environment variables.
    """
    if num_ranks is not None:
        variables = {"MASTER_PORT": str(free_port())} | variables
    return fork_server().start([str(word) for word in arguments], job_environment(**variables), cwd, num_ranks)


def run_python(
    *arguments: str | Path, timeout: float = HANGS, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end as a fork of the fork server."""
    return finish(start_python(*arguments, cwd=cwd), arguments, timeout)


def run_bitfleet(*arguments: str | Path, timeout: float = HANGS) -> subprocess.CompletedProcess[str]:
    """Run `bitfleet ARGUMENTS` to its end as a fork of the fork server."""
    return run_python("-m", "bitfleet.launch", *arguments, timeout=timeout)


def run_ranks(num_ranks: int, *arguments: str | Path, timeout: float = HANGS) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` on N ranks, forks of the fork server, to the end of all."""
    return finish(start_python(*arguments, num_ranks=num_ranks), arguments, timeout)


@pytest.fixture(scope="session")
def deepspeed() -> Launch:
    """Run a script on N ranks under the DeepSpeed launcher, for tests of what the launcher does;
    others use `run_ranks`."""

    def launch(num_ranks: int, *arguments: str | Path, timeout: float = HANGS) -> subprocess.CompletedProcess[str]:
        launcher = ["deepspeed", "--num_accelerators", str(num_ranks), "--master_port", str(free_port())]
        return run_command([*launcher, *arguments], timeout=timeout)

    return launch


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of one rank inside the test's process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
