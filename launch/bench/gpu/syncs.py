"""Where the host waits for the GPU: every synchronisation inside, by the line of bitfleet or DeepSpeed that causes it."""

import collections
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SYNCHRONIZING = "synchronizing CUDA operation"
"""In the warning of torch.cuda.set_sync_debug_mode("warn")."""
_LIBRARIES = ("bitfleet", "deepspeed")
_SHOWN_CODE = 60  # characters

Places = collections.Counter[str]
"""Place -> how often."""


class Waits(NamedTuple):
    """What made the host wait for the GPU."""

    syncs: Places
    """It waited for everything that was queued: the GPU ran dry."""
    events: Places
    """It waited for one event, such as the end of a copy of the step before, while the GPU had more to do."""


@contextmanager
def host_waits(device: torch.device) -> Iterator[Waits]:
    """Count what makes the host wait for the GPU inside: synchronising operations and waits for the device, a stream or an event.

    Only waits of the threads that train count, the main one and autograd's: a loader's thread may wait. On a CPU nothing waits,
    and only the calls of torch.cuda.synchronize and its like are counted.

    Args:
        device: where the model runs.

    Yields:
        The counts by place, which grow.
    """
    waits = Waits(collections.Counter(), collections.Counter())

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if _SYNCHRONIZING in str(message) and _is_training_thread():
            waits.syncs[place_of(traceback.extract_stack()[:-1])] += 1

    with ExitStack() as stack:
        for owner, places in (
            (torch.cuda, waits.syncs),
            (torch.cuda.Stream, waits.syncs),
            (torch.cuda.Event, waits.events),
        ):
            counted = _counted(owner.synchronize, places)
            stack.enter_context(mock.patch.object(owner, "synchronize", counted))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        stack.enter_context(mock.patch.object(warnings, "showwarning", show))
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield waits


def _counted(function: Callable[..., Any], places: Places) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if _is_training_thread():
            places[f"{function.__qualname__} from {place_of(traceback.extract_stack()[:-1])}"] += 1
        return function(*arguments, **options)

    return call


def _is_training_thread() -> bool:
    """Whether this is the main thread, or one that torch has made, for backward: Python calls those Dummy-1, Dummy-2, ..."""
    current = threading.current_thread()
    return current is threading.main_thread() or current.name.startswith("Dummy-")


def place_of(stack: traceback.StackSummary | list[traceback.FrameSummary]) -> str:
    """The innermost line of a stack that belongs to bitfleet or DeepSpeed, as "trainer/trainer.py:123 <code>"."""
    for frame in reversed(stack):
        parts = Path(frame.filename).parts
        for library in _LIBRARIES:
            if library in parts and frame.filename != __file__:
                file = "/".join(parts[parts.index(library) + (library == "bitfleet") :])
                return f"{file}:{frame.lineno} {(frame.line or '')[:_SHOWN_CODE]}"
    return "elsewhere"


class PageableCopies(TorchDispatchMode):
    """Counts copies between the GPU and memory of the host that is not pinned: those wait for the stream above 64 KiB.

    torch.cuda.set_sync_debug_mode does not see them where they were asked for as non_blocking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Places = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
            if any(each.is_cuda for each in tensors) and any(
                each.device.type == "cpu" and each.dim() > 0 and not each.is_pinned() for each in tensors
            ):
                self.places[place_of(traceback.extract_stack()[:-1])] += 1
        return result
