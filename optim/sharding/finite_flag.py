"""Tell the host one step later whether every gradient of a step was finite, which the device
decides."""

import torch
from torch import Tensor


class FiniteFlag:
    """Brings one flag to the host while the device keeps running.

    Waiting for the flag of step t - 1 when forward and backward of step t are queued lets no device
    run dry: it still has that work.

    Args:
        device: where the flag is made.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.ones((), dtype=torch.bool, pin_memory=on_gpu)
        self._read = self._host.numpy()  # the same memory
        self._copied = torch.cuda.Event() if on_gpu else None
        self._is_pending = False

    def put(self, finite: Tensor) -> None:
        """Queue the copy of `finite`, bool []; the one before has been read."""
        assert not self._is_pending
        self._host.copy_(finite, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._is_pending = True

    def read(self) -> bool:
        """Wait for the flag that was put last; True if none is pending."""
        if not self._is_pending:
            return True
        self._is_pending = False
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._read)
