"""Networks are timed in turns, eager and compiled."""

from collections.abc import Iterator

import pytest
import torch

from bitfleet.launch.bench import training
from bitfleet.launch.bench.training import Setting, measure_settings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """A precision is a setting of the whole process."""
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.mark.usefixtures("process_group")
def test_every_setting_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr("bitfleet.launch.bench.training.compile_network", lambda m: compiled.append(type(m).__name__))
    settings = [
        Setting(name, 2, "bf16", is_compiled)
        for is_compiled in (False, True)
        for name in ("resnet18", "birealnet_small")
    ]
    rows = measure_settings(settings, 32, CPU, num_rounds=2, num_steps=1)
    assert [(row["what"], row["is_compiled"]) for row in rows] == [(name, kind) for name, _, _, kind, _ in settings]
    assert compiled == ["ResNet", "BiRealNet"]
    assert min(row["images_per_second"] for row in rows) > 0
    assert {row["peak_MB"] for row in rows} == {None}


class Step:
    """A training step that takes the seconds that it is given, one value per turn."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)

    def __call__(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_networks_are_compared_with_the_reference_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # A round to warm up, and three that count.
    steps = {"resnet18": Step(9.0, 1.0, 2.0, 1.0), "xnornet": Step(9.0, 2.0, 2.0, 4.0)}
    monkeypatch.setattr(training, "setting_step", lambda setting, *_: steps[setting.network])
    monkeypatch.setattr(training, "seconds_per_call", lambda step, *_: next(step.seconds))
    settings = [Setting("resnet18", 8, "fp32"), Setting("xnornet", 8, "fp32")]
    reference, other = measure_settings(settings, 32, CPU, num_rounds=3, num_steps=1)
    assert (reference["images_per_second"], reference["of_resnet18"]) == (8.0, 1.0)
    assert (other["images_per_second"], other["of_resnet18"], other["least"], other["most"]) == (4.0, 0.5, 0.25, 1.0)
