"""The settings of a run on a GPU: TF32 or not, sums in fp32, the doctor's kernel, and NCCL on one
rank."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from bitfleet.launch.doctor.facts import compare_kernel
from bitfleet.trainer.engine.arithmetic import use_arithmetic
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.engine.engine import autocast
from bitfleet.trainer.ranks.collectives import Ranks, connect, gpu_uuid, process_group

pytestmark = pytest.mark.gpu
FAN_IN = 9216
"""Sizes of XNOR-Net's largest layer."""


def skip_tf32_of_a_cpu(precision: str, device: torch.device) -> None:
    if precision == "tf32" and device.type == "cpu":
        pytest.skip("a CPU has no TF32")


@pytest.mark.parametrize(("precision", "low", "high"), [("fp32", 0.0, 2e-6), ("tf32", 1e-5, 2e-3)])
def test_real_products_are_tf32_or_not(precision: Any, low: float, high: float, device: torch.device) -> None:
    skip_tf32_of_a_cpu(precision, device)
    use_arithmetic(device, EngineConfig(precision=precision))
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 16, 16, device=device), torch.randn(64, 64, 3, 3, device=device)
    for found, exact in (
        (F.conv2d(x, weight), F.conv2d(x.double(), weight.double())),
        (
            F.linear(x.flatten(1)[:, :FAN_IN], x.flatten(1)[:, :FAN_IN]),
            F.linear(*2 * [x.flatten(1)[:, :FAN_IN].double()]),
        ),
    ):
        assert low <= float((found - exact).norm() / exact.norm()) <= high


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_sums_of_a_binary_layer_are_added_in_fp32(precision: Any, device: torch.device) -> None:
    """Sum in shapes that cuBLAS may split: the result is the exact integer, rounded once."""
    skip_tf32_of_a_cpu(precision, device)
    use_arithmetic(device, EngineConfig(precision=precision))
    torch.manual_seed(0)
    for rows in (1, 8, 128, 1024):
        x, weight = torch.randn(rows, FAN_IN, device=device).sign(), torch.ones(256, FAN_IN, device=device)
        weight[:, : FAN_IN // 3] = x[0, : FAN_IN // 3]  # so that some sums are large
        with autocast(device, precision):
            found = F.linear(x, weight)
        exact = F.linear(x.double(), weight.double())
        assert torch.equal(found, exact.to(found.dtype))


def test_doctors_kernel_has_the_bits_of_the_cpu(device: torch.device) -> None:
    assert compare_kernel(device) == ""


def test_the_process_group_connects_and_adds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for interface in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(interface, "lo")  # a machine without a network has no other
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    with process_group(device, Ranks(0, 1, 0, 1), store=dist.HashStore()):
        connect(device)
        total = torch.ones(3, device=device)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1, 1]
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"


def test_gpus_have_different_uuids() -> None:
    found = [gpu_uuid(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    assert len(set(found)) == len(found)
    assert "" not in found
