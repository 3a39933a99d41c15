"""Share between the tests on a GPU.

BITFLEET_GPU_DRY_RUN=1 runs all of them on the CPU, at tiny sizes: then they compare the CPU with
itself. They print figures, which pytest shows with -rP. A warning is not an error here: those of
the libraries of a new device are not known.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitfleet.launch.job import job
from bitfleet.trainer.ranks.collectives import Ranks

DRY_RUN = "BITFLEET_GPU_DRY_RUN"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def is_dry() -> bool:
    """Return True if sizes are tiny and the device is the CPU."""
    return os.environ.get(DRY_RUN) == "1"


@pytest.fixture(scope="session")
def device(is_dry: bool) -> torch.device:
    """The first GPU; in a dry run the CPU."""
    if is_dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"torch finds no CUDA device ({DRY_RUN}=1 runs this on the CPU)")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def ranks(device: torch.device) -> Iterator[Ranks]:
    """The place of this process as the only rank of a job."""
    before = dict(os.environ)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # a machine without a network has no other
    with job("cpu" if device.type == "cpu" else "gpu") as (ranks, _):
        yield ranks
    os.environ.clear()
    os.environ |= before
