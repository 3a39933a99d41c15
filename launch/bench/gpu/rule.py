"""Part "rule" of `bitfleet bench gpu`: whether the arithmetic of the optimizer has the same bits on the device as on the CPU.

Both forms of the rule are compared, on fp32 weights and on packed bits, with fp32 and bf16 gradients: over the trajectories that
were recorded from the paper's own code, and over gradients with denormals, infinities and NaN. tests/gpu asserts what is only
written down here.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from bitfleet.launch.bench.gpu.session import Session
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import (
    HyperparameterScheduler,
    OptimConfig,
    ShardedOptimizer,
    bop2ndorder_step_,
    bop_step_,
    build_optimizer,
    linear,
)
from bitfleet.optim.kernels.bits import pack_signs, popcount, unpack_signs
from bitfleet.optim.kernels.kernels import bop2ndorder_bits_, bop_bits_

Variant = Literal["bop", "none", "as_coded", "adam"]
"""Bop, or Bop2ndOrder with one of its corrections."""
Form = Literal["weights", "bits"]
"""The rule on fp32 weights, or on packed bits."""

VARIANTS: tuple[Variant, ...] = get_args(Variant)
FORMS: tuple[Form, ...] = get_args(Form)
GRAD_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOLDEN = Path(__file__).resolve().parents[3] / "tests" / "golden"
"""The recorded trajectories, which are in the source tree only."""
RECORDED_VARIANTS: dict[str, Variant] = {
    "bop": "bop",
    "bop2": "none",
    "bop2u_rescale": "as_coded",
    "bop2u_adam": "adam",
}
WILD = (0.0, -0.0, 1e-42, -1e-42, 1e10, -1e25, 3e38, float("inf"), -float("inf"), float("nan"))
CPU = torch.device("cpu")


class RuleState:
    """Weights and moments in one form on one device.

    Args:
        weights: fp32 [n], +-1, n a multiple of 8; on the CPU.
        variant: the rule.
        form: of the weights.
        device: where they are.
    """

    def __init__(self, weights: Tensor, variant: Variant, form: Form, device: torch.device) -> None:
        self.variant, self.form = variant, form
        there = weights.to(device, copy=True)
        self.held = there if form == "weights" else pack_signs(there)
        """The weights: fp32 [n], or packed, uint8 [n / 8]."""
        self.exp_avg = torch.zeros(len(weights), device=device)
        self.exp_avg_sq = torch.zeros(len(weights), device=device)

    def update(self, grad: Tensor, *, gamma: float, sigma: float, threshold: float, step: int) -> None:
        """One update with a gradient [n] on the CPU; `step` counts from 1."""
        grad = grad.to(self.held.device)
        if self.variant == "bop":
            bop = bop_step_ if self.form == "weights" else bop_bits_
            bop(self.held, grad, self.exp_avg, gamma=gamma, threshold=threshold)
            return
        bop2ndorder: Any = bop2ndorder_step_ if self.form == "weights" else bop2ndorder_bits_
        rates = {"gamma": gamma, "sigma": sigma, "threshold": threshold, "correction": self.variant, "step": step}
        bop2ndorder(self.held, grad, self.exp_avg, self.exp_avg_sq, **rates)

    def weights(self) -> Tensor:
        """The weights as fp32 [n] on the CPU."""
        if self.form == "weights":
            return self.held.to(CPU, copy=True)
        return unpack_signs(self.held.cpu(), torch.empty(len(self.exp_avg)))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that an update changes, on the CPU."""
        tensors = {"weights": self.held, "exp_avg": self.exp_avg}
        if self.variant != "bop":
            tensors["exp_avg_sq"] = self.exp_avg_sq
        return {name: tensor.cpu() for name, tensor in tensors.items()}


def num_different(a: Tensor, b: Tensor) -> int:
    """How many elements of two tensors on the CPU differ in a bit; all NaN are alike."""
    if not a.is_floating_point():
        return int((a != b).sum())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = a.view(integer) != b.view(integer)
    return int((differ & ~(a.isnan() & b.isnan())).sum())


def load_recipe(golden: Path) -> ModuleType:
    """The module that makes the inputs of the recorded trajectories, from the folder `golden`."""
    spec = importlib.util.spec_from_file_location("bitfleet_golden_recipe", golden / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Comparison(NamedTuple):
    """One form of a rule on the device against the CPU."""

    num_steps: int
    steps_with_other_flips: int | None
    """Against the recorded number of flips; None where none is recorded."""
    first_difference: dict[str, int]
    """Tensor -> first step after which its bits differ from the CPU's; empty where they never do."""


def suits(trajectory: dict[str, Any], form: Form) -> bool:
    """Whether a recorded trajectory can be run on weights of this form: real weights of a start are not bits yet."""
    return form == "weights" or trajectory["w0"] != "real"


def compare_trajectory(
    trajectory: dict[str, Any], golden: Path, form: Form, grad_dtype: str, device: torch.device, max_steps: int = 200
) -> Comparison:
    """Run a recorded trajectory on `device` and on the CPU.

    Args:
        trajectory: an entry of the recipe's TRAJ.
        golden: folder of the recordings.
        form: of the weights.
        grad_dtype: "fp32", or "bf16": then gradients are rounded, and the recorded flips do not count.
        device: what is compared with the CPU.
        max_steps: of the 200 recorded ones.
    """
    recipe = load_recipe(golden)
    recorded = np.load(golden / f"opt_{trajectory['name']}.npz")
    weights = torch.from_numpy(recipe.w0(trajectory)).reshape(-1)
    is_exact = torch.ones(len(weights), dtype=torch.bool)
    is_exact[torch.from_numpy(recorded["near_tie"].astype(np.int64))] = False
    gradients = (torch.from_numpy(grad).reshape(-1) for grad in recipe.grads(trajectory))
    variant = RECORDED_VARIANTS[trajectory["variant"]]
    here, there = (RuleState(weights, variant, form, each) for each in (CPU, device))
    first_difference: dict[str, int] = {}
    other_flips = step = 0
    for step, grad in enumerate(gradients, start=1):
        gamma, sigma, threshold = recorded["hyper"][step - 1].tolist()
        before = there.weights()
        for state in (here, there):
            state.update(grad.to(GRAD_DTYPES[grad_dtype]), gamma=gamma, sigma=sigma, threshold=threshold, step=step)
        flips = int((before.sign() != there.weights().sign())[is_exact].sum())  # the start may be real
        other_flips += flips != int(recorded["flips_excl"][step - 1])
        _note_differences(first_difference, here, there, step)
        if step == max_steps:
            break
    return Comparison(step, other_flips if grad_dtype == "fp32" else None, first_difference)


def compare_wild(
    variant: Variant, form: Form, grad_dtype: str, device: torch.device, *, numel: int, num_steps: int
) -> Comparison:
    """Run gradients of every size, with denormals, infinities and NaN among them, on `device` and on the CPU."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randint(0, 2, (numel,), generator=generator).float() * 2 - 1
    here, there = (RuleState(weights, variant, form, each) for each in (CPU, device))
    first_difference: dict[str, int] = {}
    for step in range(1, num_steps + 1):
        grad = _wild_gradient(numel, generator).to(GRAD_DTYPES[grad_dtype])
        threshold = {"bop": 1e-5, "as_coded": 2.0}.get(variant, 0.02) / step
        for state in (here, there):
            state.update(grad, gamma=0.03 / step, sigma=0.01, threshold=threshold, step=step)
        _note_differences(first_difference, here, there, step)
    return Comparison(num_steps, None, first_difference)


def _wild_gradient(numel: int, generator: torch.Generator) -> Tensor:
    grad = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-30, 3, (numel,), generator=generator)
    kinds = torch.randint(0, 40 * len(WILD), (numel,), generator=generator)
    for kind, value in enumerate(WILD):
        grad[kinds == kind] = value
    return grad


def _note_differences(first_difference: dict[str, int], here: RuleState, there: RuleState, step: int) -> None:
    theirs = there.tensors()
    for name, mine in here.tensors().items():
        if name not in first_difference and num_different(mine, theirs[name]):
            first_difference[name] = step


def compare_packing(dtype: torch.dtype, device: torch.device, *, numel: int) -> dict[str, int]:
    """Pack, unpack and count bits on `device` and on the CPU, zeros of both signs among them; elements that differ."""
    weights = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights[::17], weights[1::17] = 0.0, -0.0
    here, there = pack_signs(weights), pack_signs(weights.to(device))
    unpacked = unpack_signs(there, torch.empty_like(weights, device=device))
    return {
        "pack": num_different(here, there.cpu()),
        "unpack": num_different(unpack_signs(here, torch.empty_like(weights)), unpacked.cpu()),
        "popcount": abs(int(popcount(here)) - int(popcount(there))),
    }


class ShardedComparison(NamedTuple):
    """A ShardedOptimizer of one rank on the device against the plain optimizer on the CPU."""

    num_steps: int
    flips: int
    """Of all steps, on the CPU."""
    different_weights: int
    """Binary weights that differ after a step, summed over the steps."""
    largest_difference: float
    """Of the full-precision weights after the last step."""


def compare_sharded(device: torch.device, num_steps: int) -> ShardedComparison:
    """Give the same gradients to both for `num_steps` steps of a small Bi-Real Net, with schedules."""
    here = _Trained(CPU, num_steps, is_sharded=False)
    there = _Trained(device, num_steps, is_sharded=True)
    generator = torch.Generator().manual_seed(5)
    different = flips = 0
    before = here.binary_weights()
    for _ in range(num_steps):
        gradients = [torch.randn(p.shape, generator=generator) * 1e-3 for p in here.model.parameters()]
        for trained in (here, there):
            trained.step(gradients)
        now = here.binary_weights()
        flips += int((now != before).sum())
        different += int((now != there.binary_weights()).sum())
        before = now
    pairs = zip(here.real_weights(), there.real_weights(), strict=True)
    there.close()
    return ShardedComparison(num_steps, flips, different, max(float((a - b).abs().max()) for a, b in pairs))


class _Trained:
    """A network and its optimizer, which are fed with gradients from outside."""

    def __init__(self, device: torch.device, num_steps: int, *, is_sharded: bool) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = create_model(ModelConfig(name="birealnet_small", width=32, num_classes=10)).to(device)
        rates = OptimConfig(
            gamma=linear(3e-4, 1e-5), sigma=linear(1e-4, 1e-2), threshold=linear(1e-8, 1e-5), lr=linear(2.5e-3, 5e-6)
        )
        plain, schedules = build_optimizer(self.model, rates, num_steps=num_steps)
        self.optimizer = ShardedOptimizer(plain, bucket_numel=1 << 17) if is_sharded else plain
        self.scheduler = HyperparameterScheduler(self.optimizer, schedules)

    def step(self, gradients: list[Tensor]) -> None:
        """Backward leaves exactly `gradients`."""
        parameters = list(self.model.parameters())
        loss = torch.stack([(p * g.to(p.device)).sum() for p, g in zip(parameters, gradients, strict=True)]).sum()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.scheduler.step()

    def binary_weights(self) -> Tensor:
        """All of them, flat, on the CPU."""
        return torch.cat([p.detach().reshape(-1).cpu() for p in self.model.parameters() if getattr(p, "binary", False)])

    def real_weights(self) -> Iterator[Tensor]:
        """The others, on the CPU."""
        return (p.detach().cpu() for p in self.model.parameters() if not getattr(p, "binary", False))

    def close(self) -> None:
        """Let go of the hooks on the parameters."""
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.close()


def measure_rule(session: Session) -> None:
    """Write down every comparison."""
    for dtype in (torch.float32, torch.bfloat16):
        session.attempt("pack, unpack, popcount", _measure_packing, session, dtype)
    session.attempt("recorded trajectories", _measure_trajectories, session)
    session.attempt("wild gradients", _measure_wild, session)
    session.attempt("sharded optimizer, one rank", _measure_sharded, session)


def _measure_packing(session: Session, dtype: torch.dtype) -> None:
    numel = 1 << (12 if session.tiny else 22)
    different = compare_packing(dtype, session.device, numel=numel)
    session.add("pack, unpack, popcount", weights=str(dtype).removeprefix("torch."), numel=numel, different=different)


def _measure_sharded(session: Session) -> None:
    result = compare_sharded(session.device, 5 if session.tiny else 60)
    session.add("sharded optimizer, one rank", **result._asdict())


def _measure_trajectories(session: Session) -> None:
    if not (GOLDEN / "recipe.py").exists():
        session.add("recorded trajectories", skipped=f"{GOLDEN} is not there: run this in the source tree")
        return
    for trajectory in load_recipe(GOLDEN).TRAJ:
        for grad_dtype in GRAD_DTYPES:
            for form in (form for form in FORMS if suits(trajectory, form)):
                steps = 10 if session.tiny else 200
                result = compare_trajectory(trajectory, GOLDEN, form, grad_dtype, session.device, steps)
                facts = {"trajectory": trajectory["name"], "form": form, "gradients": grad_dtype}
                session.add("recorded trajectory", **facts, **result._asdict())


def _measure_wild(session: Session) -> None:
    numel, num_steps = (2048, 3) if session.tiny else (262_144, 20)
    for variant in VARIANTS:
        for grad_dtype in GRAD_DTYPES:
            for form in FORMS:
                result = compare_wild(variant, form, grad_dtype, session.device, numel=numel, num_steps=num_steps)
                facts = {"variant": variant, "form": form, "gradients": grad_dtype, "numel": numel}
                session.add("wild gradients", **facts, num_steps=num_steps, first_difference=result.first_difference)
