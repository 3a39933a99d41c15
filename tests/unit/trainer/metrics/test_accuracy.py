from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitfleet.optim import OptimConfig, Schedule, binary_rules, build_optimizer
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.metrics import AccuracyMeter, MetricsWriter, hyperparameters_of, read_metrics
from bitfleet.trainer.metrics.step_observer import FlipCounter, Stopwatch
from bitfleet.trainer.metrics.writer import order_event_files


@pytest.mark.usefixtures("process_group")
def test_accuracy_is_the_mean_over_images_of_uneven_batches() -> None:
    meter = AccuracyMeter(torch.device("cpu"))
    logits = torch.eye(10)[torch.tensor([0, 1, 2, 3])] + torch.linspace(0, 0.1, 10)
    meter.add(torch.tensor(1.0), logits, torch.tensor([0, 1, 9, 0]))  # right, right, in the top 5, wrong
    meter.add(torch.tensor(4.0), logits[:1], torch.tensor([0]))
    meter.add(torch.tensor(0.0), logits[:0], torch.tensor([], dtype=torch.int64))
    accuracy = meter.read()
    assert accuracy == pytest.approx((8 / 5, 3 / 5, 4 / 5, 5))
    assert meter.read().num_images == 0


@pytest.mark.parametrize("rule", binary_rules())
def test_every_schedule_is_reported(rule: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[0].weight.binary = True  # type: ignore[assignment]
    optimizer, _ = build_optimizer(model, OptimConfig(rule=rule), num_steps=10)  # type: ignore[arg-type]
    expected = {name: value.start for name, value in binary_rules()[rule].items() if isinstance(value, Schedule)}
    expected |= {"rho": 0.0} if rule == "bnew" else {}
    assert hyperparameters_of(optimizer) == expected | {"lr": 1e-3}


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: item(), tolist(), nonzero(), copies to the
    CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("process_group")
def test_counting_a_batch_never_waits_for_the_device() -> None:
    meter = AccuracyMeter(torch.device("cpu"))
    with HostReads() as reads:
        meter.add(torch.tensor(1.0), torch.randn(6, 10), torch.zeros(6, dtype=torch.int64))
        assert reads.found == []
        torch.ones(1).item()
    assert len(reads.found) == 1


@pytest.mark.usefixtures("process_group")
def test_top5_with_fewer_classes() -> None:
    meter = AccuracyMeter(torch.device("cpu"))
    meter.add(torch.tensor(1.0), torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    assert meter.read().top5 == 1.0


@pytest.mark.usefixtures("process_group")
def test_further_means_are_counted_with_the_others() -> None:
    """Over uneven batches, an interruption, and a step that was skipped."""
    device, logits, labels = torch.device("cpu"), torch.randn(3, 4), torch.tensor([0, 1, 2])
    before, meter = (AccuracyMeter(device, ("soft", "agreement")) for _ in range(2))
    before.add(torch.tensor(1.0), logits, labels, torch.tensor([2.0, 1 / 3]))
    meter.load(before.peek())
    meter.keep()
    meter.add(torch.tensor(9.0), logits, labels, torch.tensor([float("nan"), 1.0]))
    meter.end_step(False)
    meter.add(torch.tensor(5.0), logits[:1], labels[:1], torch.tensor([4.0, 1.0]))
    accuracy, means, counts = meter.read_with(torch.tensor([7, 8]))
    assert (accuracy.loss, accuracy.num_images, counts) == (2.0, 4, [7, 8])
    assert means == pytest.approx({"soft": 2.5, "agreement": 0.5})


def test_flip_ratio_counts_changed_binary_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4), nn.Linear(4, 8, bias=False))
    model[0].weight.binary = model[2].weight.binary = True
    flips = FlipCounter(model)
    flips.before_step()
    with torch.no_grad():
        model[0].weight[0, 0] *= -1
        model[2].weight[:2] *= -1
        model[1].weight *= -1
    assert flips.flip_ratios(flips.take().tolist()) == {
        "flip_ratio": 9 / 40,
        "flip_ratio/0.weight": 1 / 8,
        "flip_ratio/2.weight": 8 / 32,
    }
    assert FlipCounter(nn.Linear(2, 2)).flip_ratios([]) == {}


def test_stopwatch_leaves_out_what_was_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and seconds of a report are those of the same steps, also when a validation came
    between."""
    now = 0.0
    monkeypatch.setattr("bitfleet.trainer.metrics.step_observer.time.perf_counter", lambda: now)
    watch = Stopwatch()
    now = 3.0
    watch.waited(0.5)
    now = 103.0
    watch.leave_out(100.0)
    now = 105.0
    assert watch.read() == (5.0, 0.5)
    now = 106.0
    assert watch.read() == (1.0, 0.0)


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsWriter(tmp_path, 0)
    for step in (5, 10, 15):
        log.write("train", step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2')  # the crash cut it off
    again = MetricsWriter(tmp_path, 10)
    again.write("train", 15, {"loss": 7.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(5, 0.2), (10, 0.1), (15, 7.0)]


def test_event_files_stay_in_order_when_the_clock_is_set_back(tmp_path: Path) -> None:
    names = ["events.out.tfevents.1700000000.host.1.0", "events.out.tfevents.1700000500.host.2.0"]
    for name in names:
        (tmp_path / name).write_text(name)
    order_event_files(tmp_path, 1700000600.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    order_event_files(tmp_path, 1600000000.0)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == names
    assert max(path.name for path in tmp_path.iterdir()) < "events.out.tfevents.1600000000"
    order_event_files(tmp_path / "missing", 0.0)


@pytest.mark.usefixtures("process_group")
def test_meter_does_not_depend_on_order_or_interruption() -> None:
    losses = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 7
    logits, labels = torch.randn(1, 10), torch.zeros(1, dtype=torch.long)
    one, other = AccuracyMeter(torch.device("cpu")), AccuracyMeter(torch.device("cpu"))
    for loss in losses:
        one.add(loss, logits, labels)
    for loss in losses.flip(0)[:30]:
        other.add(loss, logits, labels)
    resumed = AccuracyMeter(torch.device("cpu"))
    resumed.load(other.peek())
    resumed.add(losses.flip(0)[30:], logits.expand(34, -1), labels.expand(34))
    resumed.keep()
    resumed.add(torch.tensor(float("nan")), logits, labels)
    resumed.end_step(False)
    assert one.read() == resumed.read()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("updated", [False, torch.tensor(False)])
def test_skipped_step_leaves_no_trace_in_the_statistics(updated: bool | torch.Tensor) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    statistics = RunningStatistics(model, num_replicas=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with statistics.replica():
            model(torch.full((4, 3), float("nan")))
    statistics.end_step(updated)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_broken_line_inside_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('nonsense\n{"kind": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is not JSON"):
        read_metrics(tmp_path)


@pytest.mark.usefixtures("process_group")
def test_running_statistics_are_the_mean_over_replicas() -> None:
    """Two replicas on one rank: each advances the step's first statistics by its own batch; the
    result is their mean."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    alone = nn.BatchNorm1d(3)
    statistics = RunningStatistics(model, num_replicas=2)
    batches = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    for batch in batches:
        with statistics.replica():
            model(batch)
    statistics.end_step()
    means = []
    for batch in batches:
        alone.reset_running_stats()
        alone(batch)
        means.append(alone.running_mean.clone())  # type: ignore[union-attr]
    assert torch.equal(model[0].running_mean, (means[0] + means[1]) / 2)


@pytest.mark.usefixtures("process_group")
def test_running_statistics_of_a_model_without_any() -> None:
    statistics = RunningStatistics(nn.Linear(2, 2), num_replicas=2)
    with statistics.replica():
        pass
    statistics.end_step()
    assert statistics.numel == 0


def test_a_real_weight_flips_with_its_sign() -> None:
    """Weights of bnew change at every step; their signs do not."""
    model = nn.Linear(4, 1, bias=False)
    model.weight.binary = True  # type: ignore[attr-defined]
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.5, 0.0, 1.0]]))
        flips = FlipCounter(model)
        flips.before_step()
        model.weight.copy_(torch.tensor([[0.4, 0.1, -0.1, 1.0]]))
    assert flips.flip_ratios(flips.take().tolist())["flip_ratio"] == 0.5
