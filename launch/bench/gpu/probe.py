"""Part "probe" of `bitfleet bench gpu`: the card, and the versions and tools of the other parts."""

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
    "torch torchvision triton timm numpy deepspeed nvidia-dali-cuda130 nvidia-dali-cuda120 pydantic tyro "
    "safetensors psutil tensorboard h5py scipy matplotlib jinja2 pytest"
).split()


def measure_probe(session: Session) -> None:
    """Write down what the machine is; a fact that cannot be found out is one error."""

    def write(what: str, read: Callable[[], dict[str, Any]]) -> None:
        session.add(what, **read())

    for what, read in (
        ("card", lambda: _card(session.device)),
        ("libraries", _libraries),
        ("flags", _flags),
        ("tools", _tools),
    ):
        session.attempt(what, write, what, read)
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    session.add("packages", versions={name: installed.get(name, "not installed") for name in PACKAGES})


def _card(device: torch.device) -> dict[str, Any]:
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    if device.type != "cuda":
        return {"name": "no CUDA device", **machine}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "memory_GB": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        **machine,
    }


def _libraries() -> dict[str, Any]:
    nccl: Any = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {**versions, "cudnn": cudnn, "nccl": ".".join(map(str, nccl)) or None}


def _flags() -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    return {
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": cudnn.allow_tf32,
        "cudnn_deterministic": cudnn.deterministic,
        "cudnn_benchmark": cudnn.benchmark,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def _tools() -> dict[str, Any]:
    """Find what torch.compile needs: compilers, and the headers of Python (Triton builds a
    module)."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compilers = {name: _output(name, "-dumpfullversion") for name in ("gcc", "g++")}
    return {**compilers, "nvcc": shutil.which("nvcc"), "Python.h": str(header) if header.exists() else None}


def _output(*command: str) -> str | None:
    """First line that a command prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]
