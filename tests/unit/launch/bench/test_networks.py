from collections.abc import Iterator

import pytest
import torch

from bitfleet.launch.bench.gpu.networks import Setting
from bitfleet.launch.bench.networks import Row, bench_networks, format_networks, ratios

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """A precision is a setting of the whole process."""
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.mark.usefixtures("process_group")
def test_rounds_of_both_networks_eager_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        "bitfleet.launch.bench.gpu.networks.compile_network", lambda m: compiled.append(type(m).__name__)
    )
    said: list[str] = []
    rows = bench_networks(
        "birealnet_small",
        "bf16",
        CPU,
        compiled=True,
        num_rounds=2,
        num_steps=1,
        batch_size=2,
        image_size=32,
        say=said.append,
    )
    assert [(row.setting.network, row.setting.is_compiled) for row in rows] == [
        ("resnet18", False),
        ("birealnet_small", False),
        ("resnet18", True),
        ("birealnet_small", True),
    ]
    assert compiled == ["ResNet", "BiRealNet"]
    assert [len(row.rates) for row in rows] == [2] * 4
    assert min(rate for row in rows for rate in row.rates) > 0
    assert said[3] == "birealnet_small, bf16, compiled: first step ..."
    assert {row.peak_bytes for row in rows} == {None}


def test_table() -> None:
    rows = [
        Row(Setting("resnet18", 8, "fp32"), 1.0, [10.0, 20.0, 10.0], 2_000_000),
        Row(Setting("xnornet", 8, "fp32"), 2.0, [15.0, 20.0, 40.0], 3_000_000),
    ]
    assert ratios(rows[1], rows) == [1.5, 1.0, 4.0]
    head, _, reference, other = format_networks(rows, CPU).splitlines()
    assert head.startswith("training steps of 8 images, fp32, cpu")
    assert reference.split() == ["resnet18", "eager", "10.0", "1.000", "(1.000", "to", "1.000)", "1.0", "2"]
    assert other.split() == ["xnornet", "eager", "20.0", "1.500", "(1.000", "to", "4.000)", "2.0", "3"]
