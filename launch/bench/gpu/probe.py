"""Part "probe" of `bitfleet bench gpu`: the card, the versions and the tools that the other parts depend on."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

from bitfleet.launch.bench.gpu.session import Session

PACKAGES = (
    "torch torchvision triton timm numpy deepspeed nvidia-dali-cuda130 nvidia-dali-cuda120 pydantic tyro safetensors psutil "
    "tensorboard h5py scipy matplotlib jinja2 pytest"
).split()


def measure_probe(session: Session) -> None:
    """Write down what the machine is; a fact that cannot be found out is one error, the others are still there."""
    session.attempt("card", lambda: session.add("card", **card(session.device)))
    for what, read in (("libraries", libraries), ("flags", flags), ("tools", tools)):
        session.attempt(what, lambda what=what, read=read: session.add(what, **read()))
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    session.add("packages", versions={name: installed.get(name, "not installed") for name in PACKAGES})


def card(device: torch.device) -> dict[str, Any]:
    """Return name, driver and size of the GPU; memory in GB."""
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


def libraries() -> dict[str, Any]:
    """Return the versions of the libraries that torch was built with."""
    nccl: Any = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "nccl": ".".join(map(str, nccl)) or None,
    }


def flags() -> dict[str, Any]:
    """Return torch's defaults of the switches on which the bits depend."""
    return {
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": torch.backends.cudnn.allow_tf32,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def tools() -> dict[str, Any]:
    """Return what torch.compile needs on a machine: compilers, and the headers of Python (Triton builds a module)."""
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
