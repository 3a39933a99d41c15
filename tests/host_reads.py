"""Counts, on a CPU, what would make the host wait for a GPU."""

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero")
"""Methods of a tensor that bring values to the host."""
DYNAMIC = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2")
"""Operators that read values, or whose result has a size that depends on them."""


def _place() -> str:
    """The innermost line of bitfleet or DeepSpeed."""
    frames = [
        f
        for f in traceback.extract_stack()
        if ("/bitfleet/" in f.filename or "/deepspeed/" in f.filename) and "/tests/" not in f.filename
    ]
    return f"{frames[-1].filename.rsplit('/bitfleet/', 1)[-1]}:{frames[-1].lineno}" if frames else "test"


class HostReads(TorchDispatchMode):
    """Collects the places inside of which a host would wait; to be entered around steps.

    A read of a tensor that `is_host` names is none: it lies in the host's memory on a GPU machine as well.
    """

    def __init__(self, is_host: Callable[[torch.Tensor], bool] = lambda tensor: False) -> None:
        super().__init__()
        self.found: list[str] = []
        self._functions = _Functions(self.found, is_host)

    def __enter__(self) -> "HostReads":
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in DYNAMIC and not (args and self._functions.is_host(args[0])):
            self.found.append(f"{func} at {_place()}")
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str], is_host: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self._found, self.is_host = found, is_host

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_read = name in READS and args and isinstance(args[0], torch.Tensor) and not self.is_host(args[0])
        is_copy = func is torch.tensor and kwargs.get("device") is not None  # from pageable memory
        if is_read or is_copy:
            self._found.append(f"{name} at {_place()}")
        return func(*args, **kwargs)
