"""The graphed step against the eager one: equal bits, on a CPU with recorded operators in place of
CUDA graphs."""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.configs import load_config
from bitfleet.models import create_model
from bitfleet.optim import HyperparameterScheduler, ShardedOptimizer, build_optimizer, linear
from bitfleet.optim.kernels import kernels
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.data.request import Batch
from bitfleet.trainer.distillation import MEASURES, Distillation, DistillConfig, Schedule, Teacher
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.step_graph import WARM_UP_STEPS, GraphedStep, check_can_capture
from bitfleet.trainer.metrics.step_observer import SlicedFlips, StepObserver
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.train_step import TrainStep
from tests.host_reads import HostReads
from tests.recorder import OperatorRecorder, Recording

NUM_STEPS, SIZE = 14, 4
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1)


class Engine:
    """The part of DeepSpeed's engine that a training step needs."""

    def __init__(self, model: nn.Module, optimizer: ShardedOptimizer, scheduler: HyperparameterScheduler) -> None:
        self._model, self._optimizer, self.lr_scheduler = model, optimizer, scheduler

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self._model(images)
        return logits

    def no_sync(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        torch.autograd.backward(loss)

    def step(self) -> None:
        if self._optimizer._reduction._replicas_done == self._optimizer.num_replicas:
            self._optimizer.step()
            self.lr_scheduler.step()


class Run:
    """A small network with everything that a step touches."""

    def __init__(
        self,
        *,
        graphed: bool,
        network: str = "birealnet_small",
        num_micro_batches: int = 2,
        distills: bool = False,
    ) -> None:
        base = load_config("fashion_quickstart")
        model = dataclasses.replace(base.model, name=network, width=4 if "small" in network else None)
        optim = dataclasses.replace(base.optim, lr=linear(1e-2, 1e-3), threshold=linear(1e-6, 1e-4))
        self.config = config = dataclasses.replace(base, model=model, optim=optim)
        torch.manual_seed(0)
        self.model = create_model(config.model)
        plain, schedules = build_optimizer(self.model, config.optim, num_steps=NUM_STEPS)
        self.optimizer = ShardedOptimizer(
            plain, num_replicas=num_micro_batches, defers=True, max_grad_norm=0.5, scales_loss=True
        )
        engine: Any = Engine(self.model, self.optimizer, HyperparameterScheduler(plain, schedules))
        self.statistics = RunningStatistics(self.model, num_micro_batches)
        self.flips = SlicedFlips(self.optimizer)
        measures = MEASURES if distills else ()
        self.observer = StepObserver(ALONE, CPU, self.flips, counts_replaced=False, measures=measures)
        self.step: TrainStep | GraphedStep
        self.step = step = TrainStep(
            engine,
            self.model,
            self.optimizer,
            self.statistics,
            self.observer,
            normalize=lambda images: normalize(images, config.data.mean, config.data.std),
            precision="fp32",
            num_micro_batches=num_micro_batches,
            distillation=self.distillation() if distills else None,
        )
        if graphed:
            scheduler = engine.lr_scheduler
            self.step = GraphedStep(step, self.optimizer, scheduler.step, OperatorRecorder(), config.model.name)
        self.model.train()

    def distillation(self) -> Distillation:
        """A teacher that is called, and labels that weigh as much."""
        config = DistillConfig(teacher="birealnet_small", temperature=3.0, label_weight=0.5)
        schedule = Schedule(
            steps_per_epoch=7, global_batch_size=SIZE, num_replicas=1, rank=0, world_size=1, num_steps=NUM_STEPS
        )
        torch.manual_seed(1)
        teacher = Teacher(create_model(self.config.model), "", CPU)
        data = self.config.data
        return Distillation(
            config, teacher, schedule, normalize=lambda images: normalize(images, data.mean, data.std), device=CPU
        )

    def batches(self, bad: set[int]) -> Iterator[Batch]:
        """Images whose numbers are those of the step; of a `bad` one a pixel is infinite."""
        size = 32 if self.config.model.name == "binarynet" else 28
        for number in range(NUM_STEPS * 2):
            generator = torch.Generator().manual_seed(number)
            images = torch.rand((SIZE, size, size, 3), generator=generator) * 255
            if number // 2 in bad:
                images[0, 3, 5] = torch.inf
            yield images, torch.randint(0, 10, (SIZE,), generator=generator)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes."""
        moments = {
            f"{key}/{index}": tensor
            for index, bucket in enumerate(self.optimizer.buckets)
            for key, tensor in bucket.state.items()
        }
        assert self.optimizer.loss_scale is not None
        return {
            **self.model.state_dict(),
            **moments,
            "meter": self.observer.meter._sums,
            "scale": self.optimizer.loss_scale.value,
        }


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch, process_group: None) -> None:
    """Their calls are not operators, so they cannot be recorded."""
    monkeypatch.setattr(kernels, "kernel_library", lambda: None)
    monkeypatch.setattr("bitfleet.optim.kernels.bits.kernel_library", lambda: None)
    monkeypatch.setattr("bitfleet.models.layers.layers.can_pack", lambda *_: False)


@pytest.mark.parametrize(
    ("network", "distills"), [("birealnet_small", False), ("birealnet_small", True), ("binarynet", False)]
)
def test_graphed_step_has_the_bits_of_the_eager_one(network: str, distills: bool) -> None:
    """Over warm-up, capture, skipped steps (one, and two in a row) and steps whose flips are
    counted."""
    eager, graphed = (Run(graphed=each, network=network, distills=distills) for each in (False, True))
    bad, logged = {6, 9, 10}, {7, 12, 13}
    streams = [run.batches(bad) for run in (eager, graphed)]
    for step in range(NUM_STEPS):
        counts = []
        for run, stream in zip((eager, graphed), streams, strict=True):
            if step in logged:
                run.flips.before_step()
            run.step.run(stream)
            if step in logged:
                counts.append(run.flips.take())
        if counts:
            assert torch.equal(*counts)
            assert counts[0].sum() > 0
        for name, tensor in eager.state().items():
            assert torch.equal(tensor, graphed.state()[name]), (step, name)
    assert isinstance(graphed.step, GraphedStep)
    assert isinstance(graphed.step._collect, Recording)
    assert graphed.step._collect.num_replays == NUM_STEPS - WARM_UP_STEPS
    assert graphed.optimizer.num_skipped_steps == eager.optimizer.num_skipped_steps == len(bad)
    assert graphed.optimizer.steps() == eager.optimizer.steps()
    assert len(graphed.observer.meter._sums) == (6 if distills else 4)
    assert all(graphed.observer.meter._sums > 0)


@pytest.mark.parametrize(("graphed", "distills"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_host_reads_nothing_between_logging_steps(graphed: bool, distills: bool) -> None:
    run = Run(graphed=graphed, distills=distills)
    stream = run.batches(set())
    for _ in range(WARM_UP_STEPS + 1):
        run.step.run(stream)
    with HostReads() as reads:
        for _ in range(3):
            run.step.run(stream)
    assert reads.found == []


def test_a_logging_step_reads_once() -> None:
    run = Run(graphed=False)
    stream = run.batches(set())
    for _ in range(3):
        run.step.run(stream)
    with HostReads() as reads:
        run.flips.before_step()
        run.step.run(stream)
        run.observer.read(num_skipped_steps=lambda: run.optimizer.num_skipped_steps, num_replaced=0, log=print)
    assert [place.split()[0] for place in reads.found] == ["tolist"]


def test_a_parameter_without_a_gradient_is_named() -> None:
    run = Run(graphed=True)
    stream = run.batches(set())
    for _ in range(WARM_UP_STEPS):
        run.step.run(stream)
    run.model.forward = lambda images: run.model.head(images.mean((2, 3))[:, :1].expand(-1, 16))  # type: ignore[method-assign, union-attr, operator]
    with pytest.raises(ValueError, match="gradient of every parameter"):
        run.step.run(stream)


def test_what_cannot_be_captured_is_named() -> None:
    run = Run(graphed=True)
    stream = run.batches(set())
    for _ in range(WARM_UP_STEPS):
        run.step.run(stream)
    forward = run.model.forward
    run.model.forward = lambda images: forward(images) * float(images.sum())  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="engine.cuda_graph .*birealnet_small: operation not"):
        run.step.run(stream)


def optimizer_of(rule: str) -> Any:
    base = load_config("fashion_quickstart")
    optim = dataclasses.replace(base.optim, rule=rule, gamma=None, sigma=None, threshold=None) if rule else base.optim
    return build_optimizer(create_model(base.model), optim, num_steps=10)[0]


@pytest.mark.parametrize(
    ("device", "world_size", "message"),
    [
        ("cpu", 1, "engine.cuda_graph needs a GPU, and the model is on cpu"),
        ("cuda", 2, "captures the step of a single rank, and there are 2"),
    ],
)
def test_refused_before_training(device: str, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_can_capture(Ranks(0, world_size, 0, world_size), torch.device(device), optimizer_of(""))


def test_rules_that_decide_on_the_host_are_refused() -> None:
    optimizer = optimizer_of("")
    check_can_capture(ALONE, torch.device("cuda"), optimizer)
    optimizer.param_groups[0]["rule"] = "bnew"
    with pytest.raises(ValueError, match="bnew.*bop2nd"):
        check_can_capture(ALONE, torch.device("cuda"), optimizer)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("engine", {"sharding": "none"}, 'cuda_graph need engine.sharding "bits"'),
        ("engine", {"on_nonfinite": "stop"}, "engine.cuda_graph cannot stop before a step"),
        ("metrics", {"diagnostics": True}, "leave out metrics.diagnostics"),
        ("journal", {"enabled": True}, "leave out journal.enabled"),
    ],
)
def test_configurations_that_no_graph_can_hold(section: str, changes: dict[str, Any], message: str) -> None:
    base = load_config("fashion_quickstart")
    config: TrainConfig = dataclasses.replace(base, engine=dataclasses.replace(base.engine, cuda_graph=True))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
