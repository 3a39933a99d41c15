"""Versions of the software, and the hardware of this machine."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = "bitfleet torch torchvision deepspeed timm tensorboard numpy".split()
DALI_WHEELS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
"""Wheels of DALI, of which one is installed."""


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a run's numbers depend
    on."""
    installed = {package: version(package) for package in (*PACKAGES, *DALI_WHEELS)}
    return {"python": platform.python_version()} | {name: text for name, text in installed.items() if text}


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def git_revision() -> str | None:
    """Return the revision of this checkout, with "-dirty" appended if files differ; None outside of
    one, as of a package that is installed below another repository."""
    file = Path(__file__).resolve()
    if _git(file.parent, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *words: str) -> str | None:
    """Return what git prints in `folder`; None if it fails or prints nothing."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Return processor, usable cores, memory in bytes and GPUs of this machine, as JSON types.

    A run on the CPU has no GPUs: asking for their names would start CUDA in it.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return {
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(num_gpus)],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
