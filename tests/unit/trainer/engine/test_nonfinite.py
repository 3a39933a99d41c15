"""When steps that are skipped end a run, and what is said then."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import ShardedOptimizer, build_optimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.engine.nonfinite import (
    NonfiniteGuard,
    did_nothing,
    does_nothing,
    must_stop,
    nonfinite_loss,
    nonfinite_steps,
    weights_of,
)

INIT = Path("given.safetensors")
Make = Callable[[TrainConfig, int], ShardedOptimizer]


def config_of(precision: Any = "fp32", on_nonfinite: Any = "skip", **fields: Any) -> TrainConfig:
    base = load_config("fashion_quickstart")
    engine = dataclasses.replace(base.engine, precision=precision, on_nonfinite=on_nonfinite)
    return dataclasses.replace(base, engine=engine, model=ModelConfig(name="birealnet_small", width=8), **fields)


@pytest.fixture
def make() -> Iterator[Make]:
    """An optimizer after some skipped steps; steps without any gradient are not counted by it."""
    made = []

    def optimizer(config: TrainConfig, num_skipped: int) -> ShardedOptimizer:
        model = create_model(config.model)
        sharded = ShardedOptimizer(build_optimizer(model, config.optim, num_steps=9, seed=0)[0])
        made.append(sharded)
        for _ in range(num_skipped):
            (model(torch.randn(4, 3, 28, 28)).sum() * torch.nan).backward()
            sharded.step()
        return sharded

    yield optimizer
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("precision", "in_a_row", "nothing", "stops"),
    [
        ("fp32", 1, False, False),  # an accident
        ("fp32", 2, True, False),
        ("fp32", 20, True, True),
        ("fp16", 20, False, False),  # from 65,536 to 1 are 16 halvings, from 2^24 they are 24
        ("fp16", 24, False, False),
        ("fp16", 25, True, True),
    ],
)
def test_how_many_skipped_steps_end_a_run(
    precision: str, in_a_row: int, nothing: bool, stops: bool, make: Make
) -> None:
    config = config_of(precision)
    sharded = make(config, 0)
    sharded.num_skipped_in_a_row = in_a_row
    assert does_nothing(config.engine, sharded) is nothing
    assert must_stop(config.engine, sharded) is stops


def test_no_loss_scale_helps_broken_weights(make: Make) -> None:
    config = config_of("fp16")
    sharded = make(config, 0)
    sharded.num_skipped_in_a_row = 2
    dict(weights_of(sharded))["head.bias"].data[3] = torch.inf
    assert does_nothing(config.engine, sharded)


@pytest.mark.parametrize(("precision", "step", "nothing"), [("fp32", 2, True), ("fp32", 3, False), ("fp16", 2, False)])
def test_a_run_of_skipped_steps_alone_did_nothing(precision: str, step: int, nothing: bool, make: Make) -> None:
    """With fp16, whose first steps are often skipped, this is known only at the end of the run."""
    config = config_of(precision)
    sharded = make(config, 2)
    assert did_nothing(config.engine, sharded, step, num_steps=9) is nothing
    assert did_nothing(config.engine, sharded, 2, num_steps=2)
    assert not did_nothing(config.engine, make(config, 0), 0, num_steps=9)


def test_advice_is_not_the_setting_in_force(make: Make) -> None:
    for on_nonfinite, is_advised in (("skip", False), ("stop", True)):
        config = config_of(on_nonfinite=on_nonfinite)
        text = str(nonfinite_steps(config.engine, make(config, 1), 7, init=None, bad_inputs="", again=True))
        assert ("--engine.on_nonfinite skip" in text) is is_advised
        assert "the gradient of " in text
        assert "of 27 more" in text or " more is not finite in step 7; the state before it is saved" in text


def test_nothing_is_saved_before_the_first_step(make: Make) -> None:
    config = config_of(on_nonfinite="stop")
    text = str(nonfinite_steps(config.engine, make(config, 1), 1, init=None, bad_inputs="", again=True))
    assert "is not finite in step 1; nothing came before it: lower the learning rate" in text


def test_what_is_not_finite_is_named(make: Make) -> None:
    config = config_of()
    sharded = make(config, 2)
    assert "because" not in str(nonfinite_steps(config.engine, sharded, 2, init=INIT, bad_inputs="", again=False))
    dict(weights_of(sharded))["head.bias"].data[3] = torch.nan
    text = str(nonfinite_steps(config.engine, sharded, 2, init=INIT, bad_inputs="", again=False))
    assert (
        "in step 2, nor was one in the 1 before it, because values of head.bias are not finite; the state is saved"
        in text
    )
    assert "--init given.safetensors" in text
    assert "head.bias" in str(nonfinite_loss(config.engine, torch.nan, 2, weights_of(sharded), None))


def test_pixels_that_overflow_are_named(make: Make) -> None:
    config, pixels = config_of(), "pixels are not finite after data.mean"
    sharded = make(config, 2)
    text = str(nonfinite_steps(config.engine, sharded, 2, init=None, bad_inputs=pixels, again=False))
    assert f"because {pixels}" in text


def test_the_state_is_saved_before_a_run_ends(make: Make) -> None:
    config, saved = config_of(), []
    sharded = make(config, 2)
    guard = NonfiniteGuard(
        config.engine, None, torch.nn.Identity(), sharded, save=lambda: saved.append(1), init=None, bad_inputs=""
    )
    guard.check_step(2)  # "skip" accepts 19 in a row
    guard.check_report(2, loss=2.5, num_images=4)
    guard.check_end(3, 9, since_report=(2.5, 4))
    assert not saved
    with pytest.raises(FloatingPointError, match="not finite in step 2, nor was one in the 1 before it"):
        guard.check_report(2, loss=0.0, num_images=0)
    assert saved == [1]
    with pytest.raises(FloatingPointError, match="in step 2"):
        guard.check_end(2, 9, since_report=(0.0, 0))
    assert saved == [1]  # at the end it is already
