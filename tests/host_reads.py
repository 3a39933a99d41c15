"""Find, on a CPU, the operations that would make the host wait for a GPU."""

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero")
"""Methods of a tensor that copy values to the host."""
DYNAMIC = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2")
"""Operators that read values, or whose result has a size that depends on values."""


def _place() -> str:
    """Return the innermost line of bitfleet or DeepSpeed on the stack."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if ("/bitfleet/" in frame.filename or "/deepspeed/" in frame.filename) and "/tests/" not in frame.filename
    ]
    return f"{frames[-1].filename.rsplit('/bitfleet/', 1)[-1]}:{frames[-1].lineno}" if frames else "test"


class HostReads(TorchDispatchMode):
    """Collect the lines where a host would wait for its GPU; enter it around steps.

    Args:
        is_host: returns True for a tensor that lies in the host's memory also on a GPU machine.
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
