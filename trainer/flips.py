"""What a step flipped, as the metrics tell it: counted in the sharded step, or by comparing copies of whole weights."""

from typing import Any, NamedTuple, Protocol

from torch import nn
from torch.optim import Optimizer

from bitfleet.optim import ShardedOptimizer
from bitfleet.optim.diagnostics import BitDiagnostics, FlipCounts
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.distributed import Ranks, sum_over_ranks_
from bitfleet.trainer.engine import whole_weights
from bitfleet.trainer.metrics import FlipCounter


class FlipReport(NamedTuple):
    """Of one step; the same on every rank, except that of whole weights, which only rank 0 has."""

    ratios: dict[str, float]
    """ "flip_ratio" overall, "flip_ratio/<parameter>" each; empty without binary weights."""
    diagnostics: dict[str, Any]
    """See `BitDiagnostics.values`; empty without them."""


class StepFlips(Protocol):
    """Looks at single steps; every rank calls both, around a step."""

    def before_step(self) -> None:
        """The coming step will be looked at."""

    def after_step(self) -> FlipReport:
        """What it flipped."""


class WholeFlips:
    """Of an optimizer that is not sharded by bitfleet: rank 0 compares its weights."""

    def __init__(self, engine: Any, model: nn.Module, ranks: Ranks) -> None:
        self._engine, self._ranks, self._counter = engine, ranks, FlipCounter(model)

    def before_step(self) -> None:
        """Copy the weights."""
        with whole_weights(self._engine):
            if self._ranks.is_first:
                self._counter.before_step()

    def after_step(self) -> FlipReport:
        """Compare them."""
        with whole_weights(self._engine):
            return FlipReport(self._counter.after_step() if self._ranks.is_first else {}, {})


class SlicedFlips:
    """Of a sharded optimizer, which is observed in these steps only."""

    def __init__(self, sharded: ShardedOptimizer) -> None:
        self._sharded, self._counts = sharded, FlipCounts(sharded)

    def before_step(self) -> None:
        """Begin to observe."""
        self._sharded.observers.append(self._counts.observe)

    def after_step(self) -> FlipReport:
        """Stop, and sum over the ranks."""
        self._sharded.observers.remove(self._counts.observe)
        return FlipReport(self._counts.flip_ratios(sum_over_ranks_(self._counts.take()).tolist()), {})


class DiagnosedFlips:
    """With the diagnostics of bits, which see every step."""

    def __init__(self, diagnostics: BitDiagnostics) -> None:
        self._diagnostics = diagnostics

    def before_step(self) -> None:
        """Have the moments looked at as well."""
        self._diagnostics.wanted = True

    def after_step(self) -> FlipReport:
        """Sum over the ranks."""
        counts = sum_over_ranks_(self._diagnostics.take()).tolist()
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
