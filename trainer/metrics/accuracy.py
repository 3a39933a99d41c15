"""Count loss and accuracy on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfleet.trainer.ranks.collectives import all_reduce_sum_

LOSS_GRID = 2.0**30
NUM_IMAGES = 3
"""Place of the number of images in the sums."""


class Accuracy(NamedTuple):
    """Means over `num_images` images; the top-k are fractions."""

    loss: float
    top1: float
    top5: float
    num_images: int


class AccuracyMeter:
    """Sums of loss and hits on the device; reading them is the only sync.

    Losses are added as multiples of 2^-30 in float64: sums below 2^23 are exact, so they do not
    depend on their order, on the number of ranks, or on an interruption.
    """

    def __init__(self, device: torch.device, measures: Sequence[str] = ()) -> None:
        """Start at 0; `measures` are the names of further means."""
        self._measures = tuple(measures)
        self._sums = torch.zeros(4 + len(self._measures), dtype=torch.float64, device=device)
        self._kept = self._sums.clone()

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, measured: Tensor | None = None) -> None:
        """Count a batch: loss (its mean over the batch, 0-dim, or that of each image [N]), logits
        [N, classes], labels [N] or shares of the classes [N, classes], of which the largest counts,
        and further means over the batch [measures]."""
        if labels.dim() == 2:
            labels = labels.argmax(dim=1)
        num_images = labels.numel()
        if num_images == 0:
            return
        losses = (loss.detach().double() * (num_images if loss.dim() == 0 else 1)).mul(LOSS_GRID).round().div(LOSS_GRID)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        hits = top.double().sum(0)
        self._sums[0] += losses.sum()
        self._sums[1] += hits[0]
        self._sums[2] += hits.sum()
        self._sums[NUM_IMAGES] += num_images
        if measured is not None:
            self._sums[4:] += (measured.double() * num_images).mul(LOSS_GRID).round().div(LOSS_GRID)

    def keep(self) -> None:
        """Remember the sums, for `end_step`."""
        self._kept.copy_(self._sums)

    def end_step(self, updated: bool | Tensor) -> None:
        """Drop what was added since `keep` if the step was skipped.

        Args:
            updated: whether the step was not: known to the host, or bool [] on the device.
        """
        if isinstance(updated, Tensor):
            self._sums.copy_(torch.where(updated, self._sums, self._kept))
        elif not updated:
            self._sums.copy_(self._kept)

    def peek(self) -> list[float]:
        """Return the sums over all ranks since the last reading, for a checkpoint; every rank calls
        this."""
        sums: list[float] = all_reduce_sum_(self._sums.clone()).tolist()
        return sums

    def load(self, sums: Sequence[float]) -> None:
        """Continue from `peek`; on one rank only, the others start at 0."""
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def read(self) -> Accuracy:
        """Return the means over everything counted on all ranks since the last reading; every rank
        calls this."""
        return self.read_with(self._sums[:0])[0]

    def read_with(self, counts: Tensor) -> tuple[Accuracy, dict[str, float], list[int]]:
        """Read, with the further means, and in the same collective and host sync the sums over the
        ranks of `counts`, int64 [n], each below 2^53."""
        sums = torch.cat([self._sums, counts.to(self._sums)])
        loss, top1, top5, num_images, *further = all_reduce_sum_(sums).tolist()
        self._sums.zero_()
        count = max(num_images, 1.0)
        accuracy = Accuracy(loss / count, top1 / count, top5 / count, int(num_images))
        num_measures = len(self._measures)
        means = {name: each / count for name, each in zip(self._measures, further[:num_measures], strict=True)}
        return accuracy, means, [int(each) for each in further[num_measures:]]
