"""The clock of the benchmarks: seconds of a call, on a CPU or on a GPU."""

import time
from collections.abc import Callable

import torch


def seconds_per_call(run: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Call `run` `num_calls` times in a row and return the mean seconds of a call.

    On a GPU this is the time between two events of the current stream, so it holds the gaps in which the GPU waits for the host
    to launch, but not the launch of the first call.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(num_calls):
            run()
        return (time.perf_counter() - start) / num_calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(num_calls):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / num_calls


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done everything that was launched; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
