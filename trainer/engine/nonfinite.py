"""Steps without a finite gradient: how many a run tolerates, and what it says when it ends because
of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.sharding.loss_scale import LARGEST, LEAST
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.engine.engine import whole_weights

MAX_SKIPPED_IN_A_ROW = 20
"""More steps without a finite gradient than an accident explains."""
HALVINGS = int(math.log2(LARGEST / LEAST))
"""Skipped steps in a row after which the loss scale of fp16 cannot be the reason: it is at its
smallest."""
MAX_NAMES = 3


class NonfiniteGuard:
    """Ends a run whose gradients or losses are not finite; every rank calls its methods.

    Args:
        config: of the run's engine.
        engine: DeepSpeed's, around `model`.
        model: the network.
        optimizer: of the engine; only a `ShardedOptimizer` says which steps were skipped.
        save: saves the state that the run ends with, and waits for it.
        init: file that the weights came from.
        bad_inputs: why pixels are not finite, "" if they are.
    """

    def __init__(
        self,
        config: EngineConfig,
        engine: Any,
        model: nn.Module,
        optimizer: RoutedOptimizer | ShardedOptimizer,
        *,
        save: Callable[[], None],
        init: Path | None,
        bad_inputs: str,
    ) -> None:
        self._config, self._engine, self._model, self._save = config, engine, model, save
        self._sharded = optimizer if isinstance(optimizer, ShardedOptimizer) else None
        self._init, self._bad_inputs = init, bad_inputs

    def check_step(self, step: int) -> None:
        """Raise FloatingPointError if the optimizer has skipped `step`, from 1, and that ends the
        run, which makes this step again when it continues."""
        sharded = self._sharded
        if sharded is not None and sharded.updated is False and must_stop(self._config, sharded):
            sharded.forget_skipped_step()
            self._save()
            raise self._steps(sharded, step, again=True)

    def check_report(self, step: int, loss: float, num_images: int) -> None:
        """Raise FloatingPointError if the mean loss since the last report is not finite, or all
        steps since then were skipped, unless that is an accident.

        Args:
            step: steps so far.
            loss: mean over the steps that were not skipped.
            num_images: of these steps.
        """
        sharded = self._sharded
        if num_images == 0 and sharded is not None:
            if does_nothing(self._config, sharded):
                self._save()
                raise self._steps(sharded, step, again=False)
        elif not math.isfinite(loss):
            if sharded is not None:  # which let no such gradient into its state
                self._save()
            self._raise_for_loss(loss, step)

    def check_end(self, step: int, num_steps: int, *, since_report: tuple[float, int] | None) -> None:
        """Raise FloatingPointError if a run whose state is saved has ended without having done
        anything.

        Args:
            step: steps so far.
            num_steps: of the whole run.
            since_report: sum of losses and number of images since the last report; None if that was
                at `step`.
        """
        sharded = self._sharded
        if sharded is None:
            if since_report is not None and not math.isfinite(since_report[0]):
                self._raise_for_loss(since_report[0], step)
        elif sharded.num_skipped_steps:
            all_skipped = since_report is not None and since_report[1] == 0
            if (all_skipped and does_nothing(self._config, sharded)) or did_nothing(
                self._config, sharded, step, num_steps
            ):
                raise self._steps(sharded, step, again=False)

    def _steps(self, sharded: ShardedOptimizer, step: int, *, again: bool) -> FloatingPointError:
        return nonfinite_steps(self._config, sharded, step, init=self._init, bad_inputs=self._bad_inputs, again=again)

    def _raise_for_loss(self, loss: float, step: int) -> NoReturn:
        with whole_weights(self._engine):
            raise nonfinite_loss(self._config, loss, step, self._model.named_parameters(), self._init)


def must_stop(config: EngineConfig, sharded: ShardedOptimizer) -> bool:
    """Return True if a step that was just skipped ends the run; fp16 skips steps to find its loss
    scale."""
    most = HALVINGS + 1 if config.precision == "fp16" else MAX_SKIPPED_IN_A_ROW
    return config.on_nonfinite == "stop" or sharded.num_skipped_in_a_row >= most


def does_nothing(config: EngineConfig, sharded: ShardedOptimizer) -> bool:
    """Return True if a run ends because all steps since the last report were skipped: a single one
    is an accident.

    If weights are not finite, no loss scale of fp16 helps.
    """
    in_a_row = sharded.num_skipped_in_a_row
    return in_a_row > (HALVINGS if config.precision == "fp16" else 1) or bool(broken(weights_of(sharded)))


def did_nothing(config: EngineConfig, sharded: ShardedOptimizer, step: int, num_steps: int) -> bool:
    """Return True if all `step` steps of a run that ends now were skipped; in fp16 only if that is
    its whole length."""
    is_over = config.precision != "fp16" or step == num_steps
    return step > 0 and sharded.num_skipped_steps == step and is_over


def weights_of(sharded: ShardedOptimizer) -> list[tuple[str, Tensor]]:
    """Return the parameters of an optimizer with their names."""
    return [(segment.name, segment.param) for bucket in sharded.buckets for segment in bucket.segments]


def broken(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of tensors that hold values that are not finite; the host waits for the
    device."""
    return [name for name, tensor in named if tensor.is_floating_point() and not bool(tensor.isfinite().all())]


def nonfinite_steps(
    config: EngineConfig, sharded: ShardedOptimizer, step: int, *, init: Path | None, bad_inputs: str, again: bool
) -> FloatingPointError:
    """Return the error that ends a run which makes no steps and whose state is saved.

    Args:
        config: of the run.
        sharded: its optimizer; it names no gradient where only the sum of finite ones has
            overflowed.
        step: the last optimizer step, from 1.
        init: file that the weights came from.
        bad_inputs: why pixels are not finite, "" if they are.
        again: whether a run that continues makes that step again.
    """
    names, in_a_row = broken(weights_of(sharded)), sharded.num_skipped_in_a_row
    cause = f", because values of {_list(names)} are not finite" if names else ""
    if not cause and bad_inputs:
        cause = f", because {bad_inputs}"
    before = f", nor was one in the {in_a_row - 1} before it" if in_a_row > 1 else ""
    gradients = _list(sharded.nonfinite) or "all parameters together"
    what = f"the gradient of {gradients} is not finite in step {step}{before}{cause}"
    if in_a_row == 0:  # an earlier part of the run made these steps
        what = f"none of the {step:,} steps of this run was made: no gradient was finite{cause}"
    saved = "the state before it is saved" if again else "the state is saved"
    if again and step == 1:
        saved = "nothing came before it"
    return FloatingPointError(f"{what}; {saved}: {_advice(config, names, init)}")


def nonfinite_loss(
    config: EngineConfig, loss: float, step: int, named: Iterable[tuple[str, Tensor]], init: Path | None
) -> FloatingPointError:
    """Return the error that ends a run whose mean loss is not finite although its steps were made;
    `named` are its weights."""
    names = broken(named)
    cause = f", because values of {_list(names)} are not finite" if names else ""
    return FloatingPointError(f"the training loss is {loss} at step {step}{cause}: {_advice(config, names, init)}")


def _advice(config: EngineConfig, names: Sequence[str], init: Path | None) -> str:
    if names and init is not None:
        return f"look at the weights of --init {init}, or continue from a checkpoint before they broke"
    if names:
        return "start again, or from an earlier checkpoint, with a lower learning rate"
    if config.on_nonfinite == "stop":
        return "lower the learning rate, or continue with --engine.on_nonfinite skip"
    if config.precision == "fp16":
        return "lower the learning rate, or start again with --engine.precision bf16"
    return "lower the learning rate"


def _list(names: Sequence[str]) -> str:
    more = f" and of {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
