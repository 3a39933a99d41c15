"""Replace CUDA graphs on a CPU: record operators below autograd, and replay them on the same
tensors."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperatorRecorder:
    """Capture as `torch.cuda.graph` does: captured work has no effect yet, and a replay runs no
    Python code."""

    def capture(self, work: Callable[[], None]) -> "Recording":
        """Record the operators that `work` calls, and undo their effect on existing tensors."""
        recording = Recording()
        with recording:
            work()
        recording.undo()
        return recording

    def on_stream(self) -> AbstractContextManager[Any]:
        """Return a context for the capture stream; a CPU has one stream."""
        return nullcontext()


class Recording(TorchDispatchMode):
    """Operators of a capture with their arguments and results."""

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
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
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
        aliases = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        results = [tensor for tensor in results if tensor.untyped_storage().data_ptr() not in aliases]
        self._made |= {tensor.untyped_storage().data_ptr() for tensor in results}
        self._calls.append((func, args, kwargs, results))
        return result

    def _keep(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        content = torch.empty(0, dtype=torch.uint8).set_(storage)
        if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
            self._before[storage.data_ptr()] = content, content.clone()

    def undo(self) -> None:
        """Restore the tensors that existed before the capture."""
        for storage, old in self._before.values():
            storage.copy_(old)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """Call the operators again; results go to the tensors of the capture."""
        self.num_replays += 1
        for func, args, kwargs, results in self._calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            aliases = {
                leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
            }
            new = [tensor for tensor in again if tensor.untyped_storage().data_ptr() not in aliases]
            for old, tensor in zip(results, new, strict=True):
                old.copy_(tensor)
