"""The parts "trainer" and "cifar" of `bitfleet bench gpu`, without a measurement."""

from pathlib import Path

import torch

from bitfleet.launch.bench.gpu.session import Row
from bitfleet.launch.bench.gpu.trainer import VARIANTS, draw_accuracy, variants_of


def test_a_cpu_has_no_graph() -> None:
    assert not any(variant.cuda_graph for variant in variants_of(torch.device("cpu")))
    assert list(variants_of(torch.device("cuda", 0))) == list(VARIANTS)


def test_accuracy_is_drawn(tmp_path: Path) -> None:
    rows: list[Row] = [{"epoch": epoch, "of": 3, "top1": epoch / 10} for epoch in (1, 2, 3)]
    draw_accuracy(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
