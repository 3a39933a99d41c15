"""Count where the host waits for the GPU, by the line of bitfleet or DeepSpeed that causes it."""

import collections
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Places = collections.Counter[str]
"""Place -> number of waits."""


class Waits(NamedTuple):
    """The waits of the host."""

    syncs: Places
    """It waited for everything that was queued: the GPU ran dry."""
    events: Places
    """It waited for one event, such as the end of a copy, while the GPU had more to do."""


@contextmanager
def host_waits(device: torch.device) -> Iterator[Waits]:
    """Count synchronizing operations and waits for the device, a stream or an event inside.

    Only the threads that train count, the main one and autograd's: a loader's thread may wait. On a
    CPU nothing waits, and only calls such as torch.cuda.synchronize are counted.
    """
    waits = Waits(collections.Counter(), collections.Counter())

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        # The warning of torch.cuda.set_sync_debug_mode("warn").
        if "synchronizing CUDA operation" in str(message) and _is_training_thread():
            waits.syncs[place_of(traceback.extract_stack()[:-1])] += 1

    with ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            places = waits.events if owner is torch.cuda.Event else waits.syncs
            stack.enter_context(mock.patch.object(owner, "synchronize", _counted(owner.synchronize, places)))
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
    """Return True in the main thread and in torch's own, which Python calls Dummy-1, ..."""
    current = threading.current_thread()
    return current is threading.main_thread() or current.name.startswith("Dummy-")


def place_of(stack: Sequence[traceback.FrameSummary]) -> str:
    """Return the innermost line of bitfleet or DeepSpeed, as "trainer/trainer.py:123 <code>"."""
    for frame in reversed(stack):
        parts = Path(frame.filename).parts
        for library in ("bitfleet", "deepspeed"):
            if library in parts and frame.filename != __file__:
                file = "/".join(parts[parts.index(library) + (library == "bitfleet") :])
                return f"{file}:{frame.lineno} {(frame.line or '')[:60]}"
    return "elsewhere"


class PageableCopies(TorchDispatchMode):
    """Count copies between the GPU and pageable memory, which wait for the stream above 64 KiB.

    torch.cuda.set_sync_debug_mode does not see the ones that were asked for as non_blocking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Places = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator `func`, and count it if it is such a copy."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            on_host = [t for t in tensors if t.device.type == "cpu" and t.dim() > 0 and not t.is_pinned()]
            if on_host and any(tensor.is_cuda for tensor in tensors):
                self.places[place_of(traceback.extract_stack()[:-1])] += 1
        return result
