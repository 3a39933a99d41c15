"""Bytes of all tensors that are alive, counted after every operator of torch."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have seen since it was entered and that are still alive.

    Every storage counts once, however many tensors are views of it, from the operator that makes it (or first takes it) until
    its memory is given back, whichever thread does that. Scratch memory within an operator and gloo's own buffers are no
    tensors and do not count.

    Args:
        meta: count the storages on the meta device as well, which have a size but no memory: a rehearsal without any.
    """

    def __init__(self, *, meta: bool = False) -> None:
        super().__init__()
        self._meta = meta
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator `func` and look at the tensors that go in and come out."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def take_peak(self) -> int:
        """The most bytes alive at any time since the last call."""
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
