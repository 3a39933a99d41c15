"""A run that is continued by `Checkpoints`: from an older version, with TRS, and after a step that
was taken back."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import (
    OptimConfig,
    Schedule,
    ShardedOptimizer,
    TransitionConfig,
    build_optimizer,
    constant,
    driven_values,
    is_binary,
)
from bitfleet.optim.diagnostics import WINDOW, BitDiagnostics
from bitfleet.trainer.checkpoint.checkpoints import Checkpoints, TrainState, identity
from bitfleet.trainer.checkpoint.format import model_signature, read_meta
from bitfleet.trainer.checkpoint.loader import ValidCheckpoint
from bitfleet.trainer.checkpoint.run_folder import RunFolder
from bitfleet.trainer.checkpoint.tensors import contents
from bitfleet.trainer.config import TrainConfig, to_dict
from bitfleet.trainer.distillation import DistillConfig
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.engine.nonfinite import NonfiniteGuard
from bitfleet.trainer.ranks.collectives import Ranks

pytestmark = pytest.mark.usefixtures("process_group")
ALONE = Ranks(0, 1, 0, 1)
NUM_STEPS = 20


def config_of(**optim: Any) -> TrainConfig:
    return dataclasses.replace(
        load_config("fashion_quickstart"),
        model=ModelConfig(name="birealnet_small", width=8, num_classes=4),
        optim=OptimConfig(**optim),
        engine=EngineConfig(on_nonfinite="stop", precision="fp32"),
    )


class Run:
    """The state of `Trainer`, without data and without DeepSpeed."""

    def __init__(self, folder: Path, config: TrainConfig, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.config = config
        self.model = create_model(config.model)
        optimizer, schedules = build_optimizer(self.model, config.optim, num_steps=NUM_STEPS, seed=seed)
        self.sharded = ShardedOptimizer(optimizer)
        self.diagnostics = BitDiagnostics(self.sharded)
        scheduler = SimpleNamespace(schedules=schedules, load_state_dict=lambda state: None)
        engine = SimpleNamespace(lr_scheduler=scheduler, global_steps=0, zero_optimization_stage=lambda: 0)
        state = TrainState(engine, self.model, self.sharded, model_signature(self.model), self.diagnostics)
        self.checkpoints = Checkpoints(
            config.checkpoint,
            RunFolder(folder, None),
            ALONE,
            state,
            identity=identity(to_dict(config), 1, 1, "data", compiled=config.model.compile == "on"),
            constants={"config": to_dict(config)},
            steps_per_epoch=1000,
            global_batch_size=config.global_batch_size,
        )

    def train(self, num_steps: int, *, scale: float = 1.0) -> None:
        """Steps whose gradients are a function of their number."""
        for _ in range(num_steps):
            generator = torch.Generator().manual_seed(self.sharded.num_steps)
            noise = [(param * torch.randn(param.shape, generator=generator)).sum() for param in self.model.parameters()]
            torch.autograd.backward(scale * torch.stack(noise).sum())
            self.sharded.step()

    def save(self) -> None:
        self.checkpoints.save(self.sharded.num_steps)
        self.checkpoints.saver.flush()

    def saved(self) -> ValidCheckpoint:
        path = self.checkpoints.saver.last
        assert path is not None
        return ValidCheckpoint(path, read_meta(path))


Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Run] = []

    def build(config: TrainConfig, seed: int = 0) -> Run:
        made.append(Run(tmp_path / "run", config, seed))
        return made[-1]

    yield build
    for run in made:
        run.sharded.close()


def without_new_fields(meta: dict[str, Any]) -> dict[str, Any]:
    """As it was before schedules had shares and delays, before transitions, deterministic runs,
    compiled networks and teachers."""

    def older(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: older(each) for key, each in value.items() if key not in ("share", "delay_steps")}
        return value

    younger = ("transitions", "optim.transitions", "engine.deterministic", "model.compile", "model.initial_weights")
    taught = ("teacher_sha", "distill.teacher", "distill.temperature", "distill.label_weight")
    old = {key: older(value) for key, value in meta.items() if key not in (*younger, *taught)}
    del (
        old["config"]["distill"],
        old["config"]["optim"]["transitions"],
        old["config"]["engine"]["deterministic"],
        old["config"]["model"]["compile"],
        old["config"]["model"]["initial_weights"],
    )
    return old


def test_fields_that_are_younger_than_the_checkpoint_have_their_defaults(make: Make) -> None:
    config = config_of()
    first = make(config)
    first.train(3)
    first.save()
    path, meta = first.saved()
    old = without_new_fields(meta)
    assert old["optim.gamma"] != meta["optim.gamma"]
    assert make(config).checkpoints.resume(ValidCheckpoint(path, old)) == 3
    delayed = config_of(gamma=Schedule(start=1e-6, delay_steps=4))
    with pytest.raises(ValueError, match="optim.gamma is .*'delay_steps': 0"):
        make(delayed).checkpoints.resume(ValidCheckpoint(path, old))
    driven = config_of(transitions=TransitionConfig(drives="gamma"))
    with pytest.raises(ValueError, match="optim.transitions is .*'off'"):
        make(driven).checkpoints.resume(ValidCheckpoint(path, old))
    other = dataclasses.replace(config, engine=EngineConfig(sharding="zero1"))
    with pytest.raises(ValueError, match="engine.sharding is 'bits'.*'zero1'"):
        make(other).checkpoints.resume(ValidCheckpoint(path, old))
    taught = dataclasses.replace(config, distill=DistillConfig(teacher="resnet34"))
    with pytest.raises(ValueError, match="distill.teacher is ''.*'resnet34'"):
        make(taught).checkpoints.resume(ValidCheckpoint(path, old))
    compiled = dataclasses.replace(config, model=dataclasses.replace(config.model, compile="on"))
    with pytest.raises(ValueError, match="model.compile is 'off'.*'on'"):
        make(compiled).checkpoints.resume(ValidCheckpoint(path, old))
    for field, value in (("precision", "tf32"), ("deterministic", False)):
        other = dataclasses.replace(config, engine=dataclasses.replace(config.engine, **{field: value}))
        with pytest.raises(ValueError, match=f"engine.{field} is .*{value}"):
            make(other).checkpoints.resume(ValidCheckpoint(path, old))


def test_a_resumed_run_may_validate_in_other_batches(make: Make) -> None:
    config = config_of()
    first = make(config)
    first.train(1)
    first.save()
    smaller = dataclasses.replace(config, data=dataclasses.replace(config.data, val_batch_size=1))
    assert make(smaller).checkpoints.resume(ValidCheckpoint(*first.saved())) == 1


def test_only_what_decodes_counts_of_the_loader(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_loader(loader: Any) -> TrainConfig:
        config = config_of()
        return dataclasses.replace(config, data=dataclasses.replace(config.data, loader=loader))

    first = make(with_loader("memory"))
    first.train(1)
    first.save()
    path, meta = first.saved()
    assert meta["config"]["data"]["loader"] == "memory"
    assert meta["data.loader"] == "dali"

    def of(loader: str) -> ValidCheckpoint:
        """The checkpoint as a run of another loader would have written it."""
        data = meta["config"]["data"] | {"loader": loader}
        return ValidCheckpoint(path, {**meta, "config": meta["config"] | {"data": data}, "data.loader": loader})

    assert make(with_loader("dali")).checkpoints.resume(ValidCheckpoint(path, meta)) == 1
    assert make(with_loader("memory")).checkpoints.resume(of("dali")) == 1
    with pytest.raises(ValueError, match="data.loader is 'torch'.*'dali'"):
        make(with_loader("memory")).checkpoints.resume(of("torch"))
    # On a machine without DALI Pillow decodes what is kept in memory: the decoder of the checkpoint
    # counts anyway.
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert make(with_loader("memory")).checkpoints.resume(of("torch")) == 1
    with pytest.raises(ValueError, match="data.loader is 'dali'.*'torch'"):
        make(with_loader("memory")).checkpoints.resume(ValidCheckpoint(path, meta))


def test_a_configuration_that_is_refused_today_is_another_run(make: Make) -> None:
    """sigma with Bop was ignored once."""
    config = config_of(rule="bop")
    first = make(config)
    first.train(1)
    first.save()
    path, meta = first.saved()
    meta["config"]["optim"]["sigma"] = meta["optim.sigma"] = meta["optim.gamma"]
    with pytest.raises(ValueError, match="optim.sigma is .*None"):
        make(config).checkpoints.resume(ValidCheckpoint(path, meta))


def test_transitions_go_through_a_checkpoint(make: Make) -> None:
    """K, U and the flips of the last update: further steps have the same bits as without a stop."""
    config = config_of(
        gamma=constant(1e-2), threshold=constant(1e-3), transitions=TransitionConfig(drives="gamma", gain=20.0)
    )
    first, second = make(config), make(config, seed=1)
    first.train(6)
    first.save()
    values = driven_values(first.sharded.param_groups)
    assert values["gamma"] != 1e-2
    assert values["transition_rate"] > 0
    assert second.checkpoints.resume(first.saved()) == 6
    assert driven_values(second.sharded.param_groups) == values
    for run in (first, second):
        run.train(3)
    assert driven_values(second.sharded.param_groups) == driven_values(first.sharded.param_groups) != values
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_real_initial_weights_go_through_a_checkpoint_before_their_first_update(make: Make) -> None:
    """The first step is skipped, so that there is something to save before any update; a resumed
    run starts from signs."""
    config = config_of(gamma=constant(1e-2), threshold=constant(1e-3))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, initial_weights="real"))
    first, second = make(config), make(config, seed=1)
    first.train(1, scale=float("nan"))
    first.save()
    path = first.saved().path
    names = {name for name, param in first.model.named_parameters() if is_binary(param)}
    assert names
    assert {f"model.{name}" for name in names} <= set(contents(path))
    assert not any(name.startswith("bits.") for name in contents(path))
    assert second.checkpoints.resume(first.saved()) == 1
    for num_steps in (0, 1, 2):
        for run in (first, second):
            run.train(num_steps)
        assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
        is_real = any(param.abs().ne(1).any() for param in first.model.parameters() if is_binary(param))
        assert is_real == (num_steps == 0)
    first.save()
    assert {f"bits.{name}" for name in names} <= set(contents(first.saved().path))


def test_a_step_that_is_taken_back_ends_no_window(make: Make) -> None:
    """The last step of a window is not finite and stops the run; it is made again after the resume,
    and ends the window once."""
    config = config_of(rule="bop", gamma=constant(0.5), threshold=constant(0.0))
    first, second = make(config), make(config, seed=1)
    first.sharded.num_steps = WINDOW - 8
    first.train(7)
    before = [chunk.tensor.clone() for chunk in first.diagnostics.chunks()]
    first.train(1, scale=float("nan"))
    assert first.sharded.num_steps == WINDOW
    guard = NonfiniteGuard(config.engine, None, first.model, first.sharded, save=first.save, init=None, bad_inputs="")
    with pytest.raises(FloatingPointError, match=f"step {WINDOW}"):
        guard.check_step(WINDOW)
    assert (first.sharded.num_steps, first.sharded.num_skipped_steps) == (WINDOW - 1, 0)
    assert second.checkpoints.resume(first.saved()) == WINDOW - 1
    saved = [chunk.tensor for chunk in second.diagnostics.chunks()]
    assert all(torch.equal(a, b) for a, b in zip(before, saved, strict=True))
    second.train(1)
    ended = {chunk.key: chunk.tensor for chunk in second.diagnostics.chunks()}
    assert ended["oscillated"].any()
    assert not ended["fours"].any()
