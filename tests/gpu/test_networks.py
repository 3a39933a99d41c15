"""The networks on the device: gradients close to the CPU's, exact sums of binary convolutions, the
same bits twice."""

import pytest
import torch

from bitfleet.launch.bench.gpu.networks import (
    NETWORKS,
    compare_binary_sums,
    compare_gradients,
    different_gradients,
)
from bitfleet.launch.bench.training import Setting
from bitfleet.trainer.engine.config import Precision

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_those_of_the_cpu(network: str, device: torch.device, is_dry: bool) -> None:
    if is_dry and network == "birealnet18":
        pytest.skip("too large for a dry run")
    found = compare_gradients(network, "fp64", device, batch_size=2 if is_dry else 8)
    assert found["loss_device"] == pytest.approx(found["loss_cpu"], rel=1e-9)
    assert found["largest_error"] < 1e-6, found["parameter"]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_sums_of_bits_are_exact(precision: Precision, device: torch.device, is_dry: bool) -> None:
    found = compare_binary_sums(precision, 64 if is_dry else 512, device)
    assert found["num_different"] == 0
    assert found["largest_sum"] == 9 * (64 if is_dry else 512)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_deterministic_step_has_the_same_bits_twice(precision: Precision, device: torch.device, is_dry: bool) -> None:
    setting = Setting("birealnet_small" if is_dry else "birealnet18", 2 if is_dry else 64, precision)
    assert different_gradients(setting, 32 if is_dry else 224, device) == []
