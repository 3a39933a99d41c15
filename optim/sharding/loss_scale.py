"""Scale the loss dynamically for fp16, without a read by the host in a step.

fp16 has no numbers below 6e-8: gradients of activations vanish unless the loss is multiplied by a
large factor, which the optimizer takes out again. The factor is a power of two, so it rounds
nothing (Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2). An
overflow skips the step on every rank and halves it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST, LEAST, LARGEST = 2.0**16, 1.0, 2.0**24
GROWTH_STEPS = 2000
"""Finite steps in a row after which the scale is doubled, as in torch.amp.GradScaler."""


class LossScale:
    """Loss scale, and for how many steps it has held, on the device.

    Args:
        device: where the gradients are.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), FIRST, device=device)
        """Factor of the loss of the coming step, fp32 []."""
        self._held = torch.zeros((), dtype=torch.int32, device=device)

    def update_(self, finite: Tensor) -> None:
        """Halve the scale after a step that was not `finite` (bool []), double it after
        GROWTH_STEPS that were."""
        self._held.copy_(torch.where(finite, self._held + 1, 0))
        grows = self._held >= GROWTH_STEPS
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.value.mul_(factor).clamp_(LEAST, LARGEST)
        self._held.mul_(~grows)

    def state(self) -> list[float]:
        """Return the scale and the steps that it has held, for a checkpoint."""
        return [float(self.value), float(self._held)]

    def load(self, state: Sequence[float]) -> None:
        """Continue from `state`."""
        self.value.fill_(state[0])
        self._held.fill_(int(state[1]))
