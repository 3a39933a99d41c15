"""A stand-in for CUDA graphs on a CPU: operators are recorded below autograd, and replayed on the same tensors."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperatorRecorder:
    """Captures as `torch.cuda.graph` does: what was captured has not happened, and no line of Python runs in a replay."""

    def capture(self, work: Callable[[], None]) -> "Recording":
        """Record what `work` calls, and undo what it did to tensors that were there before."""
        recording = Recording()
        with recording:
            work()
        recording.undo()
        return recording

    def on_stream(self) -> AbstractContextManager[Any]:
        """A CPU has one."""
        return nullcontext()


class Recording(TorchDispatchMode):
    """The operators of a capture with the tensors that they were called with and that they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_replays = 0
        self._calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
        for argument in func._schema.arguments:
            value = named.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self._keep(tensor)
        if "batch_norm" in func.name():  # its schema does not say that it writes to the running statistics
            for tensor in args[3:5]:
                self._keep(tensor)
        result = func(*args, **kwargs)
        aliases = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in aliases]
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in made}
        self._calls.append((func, args, kwargs, made))
        return result

    def _keep(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
            self._before[storage.data_ptr()] = whole, whole.clone()

    def undo(self) -> None:
        """Give the tensors that were there before their values of then."""
        for whole, old in self._before.values():
            whole.copy_(old)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """Call the operators again; what they return goes to where it went."""
        self.num_replays += 1
        for func, args, kwargs, made in self._calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            aliases = {
                leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
            }
            new = [tensor for tensor in again if tensor.untyped_storage().data_ptr() not in aliases]
            for old, tensor in zip(made, new, strict=True):
                old.copy_(tensor)
