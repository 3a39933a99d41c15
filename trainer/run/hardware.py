"""What a machine is, for the record of a run."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in bytes and GPUs of this machine, as JSON types.

    A run on the CPU is of no GPU: to ask for their names would start CUDA in it.
    """
    return {
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.cuda.is_initialized()
        else [],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
