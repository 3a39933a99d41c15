import numpy as np
import pytest
import timm
import torch

import bitfleet.models  # noqa: F401
from bitfleet.launch.bench import packed as bench_packed
from bitfleet.launch.bench.command import bench
from bitfleet.packed.lowering import lower
from bitfleet.packed.program import Kind
from tests.unit.models.packed.networks import packed


def test_multiply_adds_are_those_of_the_size_table() -> None:
    program = lower(timm.create_model("birealnet18").eval(), 224, (0.0,) * 3, (1.0,) * 3)
    macs = {
        kind: sum(bench_packed.macs_of(o) for o in program.operations if o.kind is kind)
        for kind in (Kind.BINARY_CONV, Kind.CONV)
    }
    assert macs == {Kind.BINARY_CONV: 1_676_279_808, Kind.CONV: 137_793_536}


@pytest.mark.parametrize("name", ["birealnet_small", "reactnet_small", "quicknet"])
def test_contenders_are_the_same_network(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, width=8, num_classes=5).eval()
    program = lower(model, 40, bench_packed.MEAN, bench_packed.STD)
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3), dtype=np.uint8)
    runs = bench_packed.network_runs(model, packed(program), image)
    logits = [np.asarray(run()) for run in runs.values()]
    assert len(logits) == 4
    for row in logits:
        np.testing.assert_allclose(row, logits[0], atol=1e-4)


def test_a_network_without_binary_layers_has_no_rows_of_them() -> None:
    program = lower(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)), 8, (0.0,) * 3, (1.0,) * 3)
    rows = bench_packed.binary_rows(program, packed(program), np.zeros((1, 8, 8, 3), np.uint8), num_rounds=1)
    assert [row["what"] for row in rows] == ["all operations"]


@pytest.mark.slow
def test_bench_packed(capsys: pytest.CaptureFixture[str]) -> None:
    bench("packed --network birealnet_small --size 32 --rounds 1".split())
    text = capsys.readouterr().out
    for words in ("packed program, 2 threads", "resnet18, ONNX Runtime int8", "TMAC/s", "times as fast as one"):
        assert words in text
