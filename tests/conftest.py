"""What tests of several rooms share: a cache of their own, tiny images, and jobs started by the real launchers."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from bitfleet.launch.job import free_port

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is written to the home directory."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFLEET_CACHE", str(path))
        yield path


def write_images(root: Path, *, num_classes: int, train: int, val: int, size: int = 28) -> Path:
    """Class folders of random images whose brightness tells their class."""
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
    """4 classes, 200 training and 28 validation images: steps of 16 images, 12 of them an epoch."""
    return write_images(tmp_path_factory.mktemp("tiny") / "images", num_classes=4, train=50, val=7)


@pytest.fixture(scope="session")
def tiny(tiny_images: Path) -> list[str]:
    """Options that turn fashion_quickstart into a run of seconds on `tiny_images`."""
    return (
        f"--config fashion_quickstart --data.root {tiny_images} --model.num_classes 4 --global_batch_size 16 --epochs 3 "
        "--metrics.every_steps 5 --model.width 16"
    ).split()


def run_command(
    command: Sequence[str | Path], *, timeout: float = 120, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a job to its end in a process group of its own; one that hangs is killed and fails the test."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "PATH": f"{BIN}:{os.environ['PATH']}"}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(key, None)
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s: {command}\n{output}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@pytest.fixture(scope="session")
def deepspeed() -> Launch:
    """Run a script on N ranks under the DeepSpeed launcher."""

    def launch(num_ranks: int, *arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        launcher = ["deepspeed", "--num_accelerators", str(num_ranks), "--master_port", str(free_port())]
        return run_command([*launcher, *arguments], timeout=timeout)

    return launch


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of one rank inside the test's own process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
