"""Part "probe" of `bitfleet bench gpu`: the card, the versions and the tools that the other parts depend on."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitfleet.launch.bench.gpu.session import Session

PACKAGES = (
    "torch torchvision triton timm numpy deepspeed nvidia-dali-cuda130 nvidia-dali-cuda120 pydantic tyro safetensors psutil "
    "tensorboard h5py scipy matplotlib jinja2 pytest"
).split()
_COMMAND_SECONDS = 20


def measure_probe(session: Session) -> None:
    """Write down what the machine is; what cannot be found out is one error, the rest is still there."""
    session.attempt("card", lambda: session.add("card", **card(session.device)))
    session.attempt("libraries", lambda: session.add("libraries", **libraries()))
    session.attempt("flags", lambda: session.add("flags", **flags()))
    session.attempt("tools", lambda: session.add("tools", **tools()))
    session.attempt("packages", lambda: session.add("packages", versions=package_versions()))


def card(device: torch.device) -> dict[str, Any]:
    """Name, driver and size of the GPU; of the processor where there is none. Memory in GB."""
    facts: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    if device.type != "cuda":
        return {"name": "no CUDA device", **facts}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "memory_GB": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        **facts,
    }


def libraries() -> dict[str, Any]:
    """Versions of what torch was built with."""
    nccl: Any = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
    }


def flags() -> dict[str, Any]:
    """The switches of torch that decide which bits come out, as they are where nobody has set them."""
    return {
        "tf32_matmul": _read(lambda: torch.backends.cuda.matmul.allow_tf32),
        "tf32_convolution": _read(lambda: torch.backends.cudnn.allow_tf32),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def tools() -> dict[str, Any]:
    """What torch.compile needs on a machine: compilers, and the headers of Python (Triton builds a module of its own)."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {
        "gcc": _output("gcc", "-dumpfullversion"),
        "g++": _output("g++", "-dumpfullversion"),
        "nvcc": shutil.which("nvcc"),
        "Python.h": str(header) if header.exists() else None,
    }


def package_versions() -> dict[str, str]:
    """Version of each package that a part may need, or "not installed"."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _read(value: Callable[[], bool]) -> bool | str:
    try:
        return value()
    except RuntimeError as error:  # torch refuses to say it where its two ways of setting TF32 were mixed
        return f"unknown: {error}"[:80]


def _output(*command: str) -> str | None:
    """First line of what a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]
