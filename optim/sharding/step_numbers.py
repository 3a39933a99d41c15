"""Bring the numbers of a step (rates, thresholds, corrections) to the device, in one small copy per
step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

STRIDE = 4
"""Floats from one number to the next: each lies on 16 bytes, so that a kernel is compiled for one
alignment only."""


class StepNumbers:
    """Sends the numbers of each step to the device without waiting for it.

    The host writes into one of two pinned buffers in turns. It may write into the one of two steps
    ago: before it prepares step t it has seen the finite flag of step t - 1 (`FiniteFlag`), which
    the device sent after the copy for step t - 2.

    Args:
        device: where the kernels run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layout: tuple[tuple[str, ...], ...] = ()
        self._hosts: list[Tensor] = []
        self._values = torch.empty(0, device=device)
        self._views: list[dict[str, Tensor]] = []

    def load(self, numbers: Sequence[Mapping[str, float]]) -> list[dict[str, Tensor]]:
        """Queue the copy of `numbers`; the same with fp32 [] tensors on the device, which the next
        call writes over.

        As long as the keys are those of the call before, the tensors are too: a CUDA graph can hold
        them.
        """
        layout = tuple(tuple(each) for each in numbers)
        if layout != self._layout or not self._hosts:
            self._lay_out(layout)
        host = self._hosts[0]
        self._hosts.reverse()
        host.numpy()[::STRIDE] = [value for each in numbers for value in each.values()]
        self._values.copy_(host, non_blocking=True)
        return self._views

    def _lay_out(self, layout: tuple[tuple[str, ...], ...]) -> None:
        self._layout = layout
        size = STRIDE * sum(map(len, layout))
        pinned = self._device.type == "cuda"
        self._hosts = [torch.zeros(size, pin_memory=pinned) for _ in range(2)]
        self._values = torch.zeros(size, device=self._device)
        places = iter(self._values[::STRIDE].unbind())
        self._views = [{key: next(places) for key in keys} for keys in layout]
