"""The parts "trainer" and "cifar" of `bitfleet bench gpu`, without a measurement."""

import torch

from bitfleet.launch.bench.gpu.trainer import VARIANTS, variants_of


def test_a_cpu_has_no_graph() -> None:
    assert not any(variant.cuda_graph for variant in variants_of(torch.device("cpu")))
    assert list(variants_of(torch.device("cuda", 0))) == list(VARIANTS)
