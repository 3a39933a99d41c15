"""The update rules on the device: the recorded trajectories, and the bits of the CPU."""

from typing import Any

import pytest
import torch

from bitfleet.optim.kernels.kernels import on_gpu
from tests.golden import recipe
from tests.gpu import rule
from tests.gpu.rule import Form, Variant

pytestmark = pytest.mark.gpu
forms = pytest.mark.parametrize("form", rule.FORMS)
grad_dtypes = pytest.mark.parametrize("grad_dtype", rule.GRAD_DTYPES)


@pytest.mark.parametrize(
    ("trajectory", "form"),
    [
        pytest.param(trajectory, form, id=f"{trajectory['name']}-{form}")
        for trajectory in recipe.TRAJ
        for form in rule.FORMS
        if rule.suits(trajectory, form)
    ],
)
@grad_dtypes
def test_trajectory_has_the_recorded_flips_and_the_bits_of_the_cpu(
    trajectory: dict[str, Any], form: Form, grad_dtype: str, device: torch.device, is_dry: bool
) -> None:
    steps = 5 if is_dry else recipe.N_STEPS
    found = rule.compare_trajectory(trajectory, form, grad_dtype, device, steps)
    print(found)
    assert found["num_steps"] == steps
    assert not found["steps_with_other_flips"]
    assert found["first_difference"] == {}


def test_packed_weights_are_updated_by_triton(device: torch.device, is_dry: bool) -> None:
    rule.compare_wild("none", "bits", "fp32", device, numel=640, num_steps=1)
    assert is_dry or on_gpu(lambda triton: None), "eager torch took its place"


@pytest.mark.parametrize("variant", rule.VARIANTS)
@forms
@grad_dtypes
def test_denormals_infinities_and_nan_have_the_bits_of_the_cpu(
    variant: Variant, form: Form, grad_dtype: str, device: torch.device, is_dry: bool
) -> None:
    numel, steps = (2048, 3) if is_dry else (262_144, 20)
    assert rule.compare_wild(variant, form, grad_dtype, device, numel=numel, num_steps=steps) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packing_has_the_bits_of_the_cpu(dtype: torch.dtype, device: torch.device, is_dry: bool) -> None:
    different = rule.compare_packing(dtype, device, numel=1 << (12 if is_dry else 22))
    assert different == {"pack": 0, "unpack": 0, "popcount": 0}


def test_sharded_optimizer_of_one_rank_has_the_bits_of_the_plain_one_on_the_cpu(
    device: torch.device, is_dry: bool
) -> None:
    found = rule.compare_sharded(device, 4 if is_dry else 60)
    print(found)
    assert found["flips"] > 0
    assert found["different_weights"] == 0
    assert found["largest_difference"] < 1e-6  # Adam's, whose bits are not promised
