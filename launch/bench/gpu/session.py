"""What the parts of `bitfleet bench gpu` share: the device, the time that is left, and where results go."""

import contextlib
import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bitfleet.launch.bench.gpu.rows import append_row

T = TypeVar("T")
_SHOWN_TRACEBACK = 1500  # characters


@dataclass(frozen=True, slots=True)
class Session:
    """One part of the benchmark, in a process of its own."""

    part: str
    """Name of the part."""
    device: torch.device
    """What is measured: the first GPU, or in a dry run without one the CPU."""
    output: Path
    """File of the results."""
    deadline: float
    """time.monotonic() at which the part has to be done; all processes of a Linux machine share that clock."""
    tiny: bool
    """Sizes of a dry run: every line of code runs, no figure means anything."""

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, what: str, **facts: Any) -> None:
        """Write one result."""
        append_row(self.output, self.part, what, **facts)

    def attempt(self, what: str, run: Callable[..., T], *arguments: Any, needs_seconds: float = 0.0) -> T | None:
        """Call `run(*arguments)`; where it fails, or too little time is left, that is a result, and None comes back.

        Raises:
            Exception: the GPU's context is broken, so that nothing more can run in this process.
        """
        if self.seconds_left() < needs_seconds:
            self.add(what, skipped=f"{needs_seconds:.0f} s needed, {max(self.seconds_left(), 0):.0f} s left")
            return None
        try:
            return run(*arguments)
        except Exception as error:
            where = traceback.format_exc()[-_SHOWN_TRACEBACK:]
            self.add(what, error=f"{type(error).__name__}: {error}", where=where)
            if "CUDA error" in str(error):
                raise
            return None
        finally:
            gc.collect()
            if self.is_cuda:
                with contextlib.suppress(
                    RuntimeError
                ):  # after a CUDA error, which must not be hidden by its consequences
                    torch.cuda.empty_cache()
