"""Compare the bits of the update rules on a device with the CPU's.

Both forms of the rule are compared, on fp32 weights and on packed bits, with fp32 and bf16
gradients: over the trajectories that were recorded from the paper's own code, and over gradients
with denormals, infinities and NaN.
"""

import itertools
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bitfleet.launch.bench.training import RATES
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import (
    HyperparameterScheduler,
    ShardedOptimizer,
    bop2ndorder_step_,
    bop_step_,
    build_optimizer,
    is_binary,
)
from bitfleet.optim.kernels.bits import pack_signs, popcount, unpack_signs
from bitfleet.optim.kernels.kernels import bop2ndorder_bits_, flip_packed_
from tests.conftest import REPOSITORY
from tests.golden import recipe

Variant = Literal["bop", "none", "as_coded", "adam"]
"""Bop, or Bop2ndOrder with one of its corrections."""
Form = Literal["weights", "bits"]
"""The rule on fp32 weights, or on packed bits."""
VARIANTS: tuple[Variant, ...] = get_args(Variant)
FORMS: tuple[Form, ...] = get_args(Form)
GRAD_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOLDEN = REPOSITORY / "tests" / "golden"
"""Recorded trajectories."""
RECORDED_VARIANTS: dict[str, Variant] = {
    "bop": "bop",
    "bop2": "none",
    "bop2u_rescale": "as_coded",
    "bop2u_adam": "adam",
}
WILD = (0.0, -0.0, 1e-42, -1e-42, 1e10, -1e25, 3e38, float("inf"), -float("inf"), float("nan"))
CPU = torch.device("cpu")


class RuleState:
    """Weights and moments on one device, from +-1 weights fp32 [n], n a multiple of 8."""

    def __init__(self, weights: Tensor, variant: Variant, form: Form, device: torch.device) -> None:
        self.variant, self.form = variant, form
        copy = weights.to(device, copy=True)
        self.weights = copy if form == "weights" else pack_signs(copy)
        """fp32 [n], or packed, uint8 [n / 8]."""
        self.exp_avg, self.exp_avg_sq = torch.zeros(2, len(weights), device=device)

    def update(self, grad: Tensor, *, gamma: float, sigma: float, threshold: float, step: int) -> None:
        """Update with a gradient [n] on the CPU; `step` counts from 1."""
        grad = grad.to(self.weights.device)
        if self.variant == "bop":
            if self.form == "weights":
                bop_step_(self.weights, grad, self.exp_avg, gamma=gamma, threshold=threshold)
            else:
                numbers = {"gamma": gamma, "threshold": threshold}
                flip_packed_(self.weights, grad, {"exp_avg": self.exp_avg}, numbers)
            return
        bop2ndorder: Any = bop2ndorder_step_ if self.form == "weights" else bop2ndorder_bits_
        rates = {"gamma": gamma, "sigma": sigma, "threshold": threshold, "correction": self.variant, "step": step}
        bop2ndorder(self.weights, grad, self.exp_avg, self.exp_avg_sq, **rates)

    def signs(self) -> Tensor:
        """Return the signs of the weights as fp32 [n] on the CPU; 0 for a real weight of 0."""
        if self.form == "weights":
            return self.weights.sign().cpu()
        return unpack_signs(self.weights.cpu(), torch.empty(len(self.exp_avg)))

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and moments on the CPU; Bop has only one moment."""
        names = ("weights", "exp_avg") if self.variant == "bop" else ("weights", "exp_avg", "exp_avg_sq")
        return {name: getattr(self, name).cpu() for name in names}


class Twins:
    """The same weights, updated on the CPU and on a device."""

    def __init__(self, weights: Tensor, variant: Variant, form: Form, device: torch.device) -> None:
        self.here, self.there = (RuleState(weights, variant, form, place) for place in (CPU, device))
        self.step = 0
        self.first_difference: dict[str, int] = {}
        """Tensor -> first step after which its bits differ."""

    def update(self, grad: Tensor, **rates: float) -> None:
        """Update both with a gradient [n] on the CPU, and compare their bits."""
        self.step += 1
        for state in (self.here, self.there):
            state.update(grad, step=self.step, **rates)
        others = self.there.tensors()
        for name, tensor in self.here.tensors().items():
            if name not in self.first_difference and num_different(tensor, others[name]):
                self.first_difference[name] = self.step


def num_different(a: Tensor, b: Tensor) -> int:
    """Count the elements of two tensors on the CPU that differ in a bit; all NaN are alike."""
    if not a.is_floating_point():
        return int((a != b).sum())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = a.view(integer) != b.view(integer)
    return int((differ & ~(a.isnan() & b.isnan())).sum())


def suits(trajectory: dict[str, Any], form: Form) -> bool:
    """Return whether a trajectory can start in this form: real initial weights are not bits."""
    return form == "weights" or trajectory["w0"] != "real"


def compare_trajectory(
    trajectory: dict[str, Any], form: Form, grad_dtype: str, device: torch.device, max_steps: int = 200
) -> dict[str, Any]:
    """Run an entry of the recipe's TRAJ on `device` and on the CPU, for at most 200 steps.

    Returns:
        num_steps; steps_with_other_flips than recorded, None with bf16, which rounds the gradients;
        first_difference: tensor -> first step after which its bits differ from the CPU's.
    """
    recorded = np.load(GOLDEN / f"opt_{trajectory['name']}.npz")
    weights = torch.from_numpy(recipe.w0(trajectory)).reshape(-1)
    is_exact = torch.ones(len(weights), dtype=torch.bool)
    is_exact[torch.from_numpy(recorded["near_tie"].astype(np.int64))] = False
    twins = Twins(weights, RECORDED_VARIANTS[trajectory["variant"]], form, device)
    other_flips = 0
    for index, gradient in enumerate(itertools.islice(recipe.grads(trajectory), max_steps)):
        rates = dict(zip(("gamma", "sigma", "threshold"), recorded["hyper"][index].tolist(), strict=True))
        before = twins.there.signs()  # the start may be real
        twins.update(torch.from_numpy(gradient).reshape(-1).to(GRAD_DTYPES[grad_dtype]), **rates)
        flips = int((before != twins.there.signs())[is_exact].sum())
        other_flips += flips != int(recorded["flips_excl"][index])
    flips_or_none = other_flips if grad_dtype == "fp32" else None
    return {
        "num_steps": twins.step,
        "steps_with_other_flips": flips_or_none,
        "first_difference": twins.first_difference,
    }


def compare_wild(
    variant: Variant, form: Form, grad_dtype: str, device: torch.device, *, numel: int, num_steps: int
) -> dict[str, int]:
    """Run gradients of every size, with denormals, infinities and NaN, on `device` and the CPU.

    Returns:
        Tensor -> first step after which its bits differ.
    """
    generator = torch.Generator().manual_seed(3)
    weights = torch.randint(0, 2, (numel,), generator=generator).float() * 2 - 1
    twins = Twins(weights, variant, form, device)
    for step in range(1, num_steps + 1):
        grad = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-30, 3, (numel,), generator=generator)
        kinds = torch.randint(0, 40 * len(WILD), (numel,), generator=generator)
        for kind, value in enumerate(WILD):
            grad[kinds == kind] = value
        threshold = {"bop": 1e-5, "as_coded": 2.0}.get(variant, 0.02) / step
        twins.update(grad.to(GRAD_DTYPES[grad_dtype]), gamma=0.03 / step, sigma=0.01, threshold=threshold)
    return twins.first_difference


def compare_packing(dtype: torch.dtype, device: torch.device, *, numel: int) -> dict[str, int]:
    """Pack, unpack and count bits on `device` and the CPU; return how many elements differ."""
    weights = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights[::17], weights[1::17] = 0.0, -0.0
    here, there = pack_signs(weights), pack_signs(weights.to(device))
    unpacked = unpack_signs(there, torch.empty_like(weights, device=device))
    return {
        "pack": num_different(here, there.cpu()),
        "unpack": num_different(unpack_signs(here, torch.empty_like(weights)), unpacked.cpu()),
        "popcount": abs(int(popcount(here)) - int(popcount(there))),
    }


def compare_sharded(device: torch.device, num_steps: int) -> dict[str, Any]:
    """Give the same gradients to a plain optimizer on the CPU and a sharded one on `device`.

    Returns:
        num_steps; flips on the CPU; different_weights: binary weights that differ after a step,
        summed over the steps; largest_difference of a full-precision weight after the last step.
    """
    here, there = _Trained(CPU, num_steps, is_sharded=False), _Trained(device, num_steps, is_sharded=True)
    generator = torch.Generator().manual_seed(5)
    different = flips = 0
    before = here.weights(binary=True)
    for _ in range(num_steps):
        gradients = [torch.randn(p.shape, generator=generator) * 1e-3 for p in here.model.parameters()]
        here.step(gradients)
        there.step(gradients)
        now = here.weights(binary=True)
        flips += int((now != before).sum())
        different += int((now != there.weights(binary=True)).sum())
        before = now
    largest = float((here.weights(binary=False) - there.weights(binary=False)).abs().max())
    assert isinstance(there.optimizer, ShardedOptimizer)
    there.optimizer.close()
    return {"num_steps": num_steps, "flips": flips, "different_weights": different, "largest_difference": largest}


class _Trained:
    """A small Bi-Real Net and its optimizer, which get their gradients from outside."""

    def __init__(self, device: torch.device, num_steps: int, *, is_sharded: bool) -> None:
        torch.manual_seed(0)
        self.model = create_model(ModelConfig(name="birealnet_small", width=32, num_classes=10)).to(device)
        plain, schedules = build_optimizer(self.model, RATES, num_steps=num_steps)
        self.optimizer = ShardedOptimizer(plain, bucket_numel=1 << 17) if is_sharded else plain
        self.scheduler = HyperparameterScheduler(self.optimizer, schedules)

    def step(self, gradients: list[Tensor]) -> None:
        """Update with exactly `gradients`, which backward leaves."""
        pairs = zip(self.model.parameters(), gradients, strict=True)
        loss = torch.stack([(p * g.to(p.device)).sum() for p, g in pairs]).sum()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.scheduler.step()

    def weights(self, *, binary: bool) -> Tensor:
        """Return all binary or all other weights, flat, on the CPU."""
        return torch.cat([p.detach().reshape(-1).cpu() for p in self.model.parameters() if is_binary(p) == binary])
