"""That the comparisons of a device with the CPU find what differs; tests/gpu asserts that nothing
does."""

import pytest
import torch
from torch import Tensor

from tests.golden import recipe
from tests.gpu import rule
from tests.gpu.rule import RuleState, compare_trajectory, compare_wild, num_different
from tests.gpu.test_networks import compare_binary_sums

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def test_bits_are_counted_and_nan_are_alike() -> None:
    a = torch.tensor([1.0, 0.0, NAN, INF, NAN])
    assert num_different(a, a.clone()) == 0
    assert num_different(a, torch.tensor([1.0, -0.0, NAN, -INF, 1.0])) == 3
    other_payload = torch.tensor([1.0, 0.0, NAN, INF, NAN])
    other_payload.view(torch.int32)[4] ^= 1
    assert num_different(a, other_payload) == 0
    assert num_different(a.bfloat16(), a.bfloat16().neg()) == 3
    assert num_different(torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1, 3], dtype=torch.uint8)) == 1


@pytest.fixture
def other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One moment of the second of two states is an ulp off, from the third update on."""
    real = RuleState.update
    first: list[RuleState] = []
    steps = 0

    def update(self: RuleState, grad: Tensor, **rates: float) -> None:
        nonlocal steps
        real(self, grad, **rates)  # type: ignore[arg-type]
        first.append(self)
        if self is not first[0]:
            steps += 1
            if steps == 3:
                self.exp_avg.view(torch.int32)[5] ^= 1

    monkeypatch.setattr(RuleState, "update", update)


@pytest.mark.usefixtures("other_bits")
@pytest.mark.parametrize("form", rule.FORMS)
def test_other_bits_are_found(form: rule.Form) -> None:
    trajectory = recipe.TRAJ[1]
    found = compare_trajectory(trajectory, form, "fp32", CPU, max_steps=6)
    assert (found["num_steps"], found["first_difference"]) == (6, {"exp_avg": 3})
    assert found["steps_with_other_flips"] == 0


@pytest.mark.usefixtures("other_bits")
def test_other_bits_of_wild_gradients_are_found() -> None:
    found = compare_wild("adam", "bits", "bf16", CPU, numel=640, num_steps=4)
    assert found["exp_avg"] == 3


def test_other_flips_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "bop2ndorder_step_", lambda *tensors, **rates: None)
    trajectory = recipe.TRAJ[1]
    found = compare_trajectory(trajectory, "weights", "fp32", CPU, max_steps=6)
    assert found["steps_with_other_flips"] == 6
    assert found["first_difference"] == {}


def test_binary_sums_stop_being_exact() -> None:
    assert compare_binary_sums("fp32", 64, CPU)["num_different"] == 0
    rounded = compare_binary_sums("bf16", 64, CPU)
    assert rounded["num_different"] > 0
    assert rounded["largest_difference"] >= 1.0
    assert rounded["largest_sum"] == 9 * 64
