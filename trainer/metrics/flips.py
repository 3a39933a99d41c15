"""What a step flipped, as the metrics tell it: counted in the sharded step, or by comparing copies of whole weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from bitfleet.optim import ShardedOptimizer
from bitfleet.optim.diagnostics import BitDiagnostics, FlipCounts
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.engine.engine import whole_weights
from bitfleet.trainer.metrics.metrics import FlipCounter
from bitfleet.trainer.ranks.collectives import Ranks


class FlipReport(NamedTuple):
    """Of one step; the same on every rank."""

    ratios: dict[str, float]
    """ "flip_ratio" overall, "flip_ratio/<parameter>" each; empty without binary weights."""
    diagnostics: dict[str, Any]
    """See `BitDiagnostics.values`; empty without them."""


class StepFlips(Protocol):
    """Looks at single steps; every rank calls all three, in this order."""

    def before_step(self) -> None:
        """The coming step will be looked at."""

    def take(self) -> Tensor:
        """The counts of this rank after it, int64 [n], on the device."""

    def report(self, counts: Sequence[int]) -> FlipReport:
        """What the step flipped, of the counts of all ranks together."""


class WholeFlips:
    """Of an optimizer that is not sharded by bitfleet: rank 0 compares its weights."""

    def __init__(self, engine: Any, model: nn.Module, ranks: Ranks) -> None:
        self._engine, self._ranks, self._counter = engine, ranks, FlipCounter(model)

    def before_step(self) -> None:
        """Copy the weights."""
        with whole_weights(self._engine):
            if self._ranks.is_first:
                self._counter.before_step()

    def take(self) -> Tensor:
        """Compare them, on rank 0."""
        with whole_weights(self._engine):
            return self._counter.take()

    def report(self, counts: Sequence[int]) -> FlipReport:
        """Ratios only."""
        return FlipReport(self._counter.flip_ratios(counts), {})


class SlicedFlips:
    """Of a sharded optimizer, which is observed in these steps only."""

    def __init__(self, sharded: ShardedOptimizer) -> None:
        self._sharded, self._counts = sharded, FlipCounts(sharded)

    def before_step(self) -> None:
        """Start to observe."""
        self._sharded.observers.append(self._counts.observe)

    def take(self) -> Tensor:
        """Stop."""
        self._sharded.observers.remove(self._counts.observe)
        return self._counts.take()

    def report(self, counts: Sequence[int]) -> FlipReport:
        """Ratios only."""
        return FlipReport(self._counts.flip_ratios(counts), {})


class DiagnosedFlips:
    """With the diagnostics of bits, which see every step."""

    def __init__(self, diagnostics: BitDiagnostics) -> None:
        self._diagnostics = diagnostics

    def before_step(self) -> None:
        """Have the moments looked at as well."""
        self._diagnostics.wanted = True

    def take(self) -> Tensor:
        """Of this rank's slices."""
        return self._diagnostics.take()

    def report(self, counts: Sequence[int]) -> FlipReport:
        """Ratios and diagnostics."""
        return FlipReport(self._diagnostics.flip_ratios(counts), self._diagnostics.values(counts))


def make_diagnostics(config: TrainConfig, optimizer: Optimizer) -> BitDiagnostics | None:
    """Those that `config` asks for.

    Raises:
        ValueError: no weight is updated as bits.
    """
    if not config.metrics.diagnostics:
        return None
    assert isinstance(optimizer, ShardedOptimizer), config.engine.sharding
    return BitDiagnostics(optimizer)


def step_flips(
    engine: Any, model: nn.Module, optimizer: Optimizer, ranks: Ranks, diagnostics: BitDiagnostics | None
) -> StepFlips:
    """The cheapest way to look at a step."""
    if diagnostics is not None:
        return DiagnosedFlips(diagnostics)
    if isinstance(optimizer, ShardedOptimizer):
        return SlicedFlips(optimizer)
    return WholeFlips(engine, model, ranks)
