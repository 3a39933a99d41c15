"""Prove in the first step of a run that every binary weight went through the rule that is
configured, or stop the run.

An optimizer that leaves a parameter out, or updates it by another rule, trains something else and
does not say so (DeepSpeed issue 8441: Muon at ZeRO stage 0 was plain SGD). The elements are counted
where rules are applied, and only until that step.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer, is_binary
from bitfleet.optim.param_groups import BINARY
from bitfleet.optim.rules.update_counts import UpdateCounts
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.ranks.collectives import all_gather_objects


class RuleProof:
    """Counts the updates of binary weights until the first step that is not skipped.

    Args:
        model: whole, before an engine takes it apart; its binary weights carry the mark.
        rule: `optim.rule`, which is to update them.
        config: its sharding. Slices of DeepSpeed's ZeRO do not say which parameters they hold:
            there the binary weights are counted together.
    """

    def __init__(self, model: nn.Module, rule: str, config: EngineConfig) -> None:
        binary = {name: param for name, param in model.named_parameters() if is_binary(param)}
        self._sizes = {name: param.numel() for name, param in binary.items() if param.requires_grad}
        self._num_frozen = len(binary) - len(self._sizes)
        self._rule, self._sharding, self._stage = rule, config.sharding, config.stage

    def begin(self, optimizer: RoutedOptimizer | ShardedOptimizer) -> None:
        """Count the updates of `optimizer` from now on."""
        optimizer.counts = UpdateCounts()

    def end(self, optimizer: RoutedOptimizer | ShardedOptimizer, step: int) -> str:
        """Stop counting and return the proof as a line; every rank calls this after a step that was
        not skipped.

        Args:
            optimizer: of `begin`.
            step: 1-based number of the step.

        Raises:
            ValueError: on every rank; a binary weight was not updated by its rule.
        """
        mine, optimizer.counts = optimizer.counts, None
        assert mine is not None
        everyone = all_gather_objects(mine.elements)
        if self._stage > 0:
            self._check_together(everyone, step)
        for name, size in self._sizes.items() if self._stage == 0 else ():
            of_ranks = [elements.get(name, {}) for elements in everyone]
            # Under "none" every rank updates everything, else its share.
            for parts in [[part] for part in of_ranks] if self._sharding == "none" else [of_ranks]:
                self._check(name, size, parts, step)
        return self._line(step)

    def _check(self, name: str, size: int, of_ranks: Sequence[Mapping[str, int]], step: int) -> None:
        updated = total(of_ranks)
        if updated == {self._rule: size}:
            return
        by_rule = " and ".join(f"{count:,} by {rule}" for rule, count in updated.items()) or "none"
        raise ValueError(
            f"the binary weight {name} has {size:,} elements to be updated by {self._rule} in step {step}, and "
            f"{by_rule} were: the network must use it in every step, and the optimizer must hold it in a group of "
            "that rule"
        )

    def _check_together(self, everyone: Sequence[Mapping[str, Mapping[str, int]]], step: int) -> None:
        """Compare the sum of all binary weights; DeepSpeed fills its slices up to equal sizes."""
        size = sum(self._sizes.values())
        updated = total([elements.get(BINARY, {}) for elements in everyone])
        if size and (set(updated) != {self._rule} or updated[self._rule] < size):
            by_rule = " and ".join(f"{count:,} by {rule}" for rule, count in updated.items()) or "none"
            raise ValueError(
                f"the {len(self._sizes)} binary weights from {next(iter(self._sizes))} on have {size:,} elements to be "
                f'updated by {self._rule} in step {step}, and {by_rule} were: use engine.sharding "bits", which '
                "names the weight that is missing"
            )

    def _line(self, step: int) -> str:
        if not self._sizes:
            return f"step {step}: the network has no binary weights to update"
        together = ", counted together as ZeRO has no names for its slices" if self._stage > 0 else ""
        frozen = f"; {self._num_frozen} more are frozen" if self._num_frozen else ""
        return (
            f"step {step}: {self._rule} updated all {len(self._sizes)} binary weights, "
            f"{sum(self._sizes.values()):,} elements{together}{frozen}"
        )


def total(of_ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return rule -> elements, summed over the ranks."""
    counts: dict[str, int] = {}
    for rules in of_ranks:
        for rule, num_elements in rules.items():
            counts[rule] = counts.get(rule, 0) + num_elements
    return counts
