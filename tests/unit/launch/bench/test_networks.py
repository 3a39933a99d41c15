"""Networks are timed in turns, eager and compiled."""

from collections.abc import Iterator

import pytest
import torch

from bitfleet.launch.bench.networks import Speed, measure_settings, network_rows
from bitfleet.launch.bench.training import Setting

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
    speeds = measure_settings(settings, 32, CPU, num_rounds=2, num_steps=1, warm_up=1)
    assert [speed.setting for speed in speeds] == settings
    assert compiled == ["ResNet", "BiRealNet"]
    assert [len(speed.rates) for speed in speeds] == [2] * 4
    assert min(rate for speed in speeds for rate in speed.rates) > 0
    assert {speed.peak_MB for speed in speeds} == {None}


def test_table() -> None:
    speeds = [
        Speed(Setting("resnet18", 8, "fp32"), 1.0, [10.0, 20.0, 10.0], 2.0, 7.0),
        Speed(Setting("xnornet", 8, "fp32"), 2.0, [15.0, 20.0, 40.0], 3.0, 7.0),
    ]
    _, reference, other = network_rows(speeds)
    assert reference == ["resnet18", "eager", "10.0", "1.000", "1.000 to 1.000", "1.0", "2"]
    assert other == ["xnornet", "eager", "20.0", "1.500", "1.000 to 4.000", "2.0", "3"]
