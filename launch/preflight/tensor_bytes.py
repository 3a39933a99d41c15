"""Count the bytes of all live tensors after every operator of torch."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have seen since it was entered and that are
    still alive.

    A storage counts once, however many tensors are views of it, until its memory is freed by any
    thread. Scratch memory within an operator and gloo's buffers are not tensors and do not count.

    Args:
        meta: also count storages on the meta device, which have a size but no memory.
    """

    def __init__(self, *, meta: bool = False) -> None:
        super().__init__()
        self._meta = meta
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator `func` and count its inputs and outputs."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def take_peak(self) -> int:
        """Return the most bytes that were alive at a time since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # the address of the storage itself; its Python object lives as long
        if key not in self._seen and (self._meta or storage.device.type != "meta"):
            self._seen[key] = storage.nbytes()
            self.live += self._seen[key]
            weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self.live -= self._seen.pop(key)
