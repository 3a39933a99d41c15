"""Configure the optimizer of a run, and build it with its schedules."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import nn

from bitfleet.optim.kernels.kernels import Correction, check_correction
from bitfleet.optim.param_groups import BINARY, DECAYED, FULL_PRECISION, check_claims, check_patterns, param_groups
from bitfleet.optim.rules import adam, sgd
from bitfleet.optim.rules.rule import RULES, Group, RoutedOptimizer, binary_rules
from bitfleet.optim.schedules import TO_END, Schedule, check_is_finite, check_is_schedule, constant
from bitfleet.optim.transitions import KEY, TransitionConfig, check_transitions, target_of

FullPrecision = Literal["keras_adam", "adam", "keras_sgd"]
FULL_PRECISION_DEFAULTS: Mapping[FullPrecision, Group] = {
    "keras_adam": adam.KERAS_DEFAULTS,
    "adam": adam.TORCH_DEFAULTS,
    "keras_sgd": sgd.KERAS_DEFAULTS,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Rule and schedules. Schedules without a length run over epochs * training images // global
    batch steps.

    A hyperparameter of the rule that is None gets the default of the rule (`Rule.defaults`); others
    stay None.
    """

    rule: str = "bop2ndorder"
    """Rule of the binary weights; docs/optimizers.md lists them with their hyperparameters."""
    correction: Correction = "none"
    """Bias correction of bop2ndorder: none, as_coded (the official "unbiased" class) or adam."""
    gamma: Schedule | None = None
    """Rate of the first moment or average."""
    sigma: Schedule | None = None
    """Rate of the second moment (bop2ndorder)."""
    threshold: Schedule | None = None
    """Flip above it; sgdat: what each flip adds to the threshold of its weight."""
    alpha: Schedule | None = None
    """Rate of the second average (two_ema, diode)."""
    latent_lr: Schedule | None = None
    """Learning rate of the latent weights (latent_adam, latent_sgd), or of what stands for them
    (sgdat, diode, bnew, real_adam)."""
    latent_clip: float | None = None
    """Latent weights of latent_adam stay in [-latent_clip, latent_clip] (QuickNet: 1.25). 0: no
    limit, and no gradient beyond 1, as in ReActNet's code."""
    latent_eps: float | None = None
    """Epsilon of latent_adam, added to the uncorrected root as Keras does."""
    latent_decay: float | None = None
    """L2 factor of real_adam, which trains real weights in the place of binary ones: the first of
    two stages."""
    momentum: float | None = None
    """Momentum of latent_sgd."""
    rho: float | None = None
    """Factor of bnew's regulariser at the end of the run; it rises from 0."""
    rho_from: float | None = None
    """Fraction of the run after which bnew's regulariser starts."""
    frozen_from: float | None = None
    """Fraction of the run after which bnew's weights are frozen signs."""
    init_inertia: float = 0.4
    """With --init: how firmly binary weights keep their loaded signs, as a multiple of the noise of
    the rule's averages. Their state is seeded from the gradients of 8 steps. 0: state starts as in
    any run, and most rules flip half of the weights at once."""
    full_precision: FullPrecision = "keras_adam"
    """Optimizer of the full-precision parameters. keras_adam: epsilon 1e-7, added to the
    uncorrected root. adam: torch's, epsilon 1e-8. keras_sgd: momentum 0.9, with the learning rate
    inside of the velocity."""
    lr: Schedule = dataclasses.field(default_factory=lambda: constant(1e-3))
    """Learning rate of the full-precision parameters."""
    weight_decay: float = 0.0
    """L2 factor on `decayed`, added to the gradient as weight_decay * w (Keras' l2(x) is
    weight_decay = 2 x)."""
    decayed: tuple[str, ...] = ()
    """Shell patterns of the parameters that have weight decay."""
    transitions: TransitionConfig = dataclasses.field(default_factory=TransitionConfig)
    """Controller that drives one of the hyperparameters by the rate of flips."""

    def __post_init__(self) -> None:
        for name in ("gamma", "sigma", "threshold", "alpha", "latent_lr", "lr"):
            if name == "lr" or getattr(self, name) is not None:
                check_is_schedule(f"optim.{name}", getattr(self, name))
        check_patterns("optim.decayed", self.decayed)
        defaults = defaults_of(self.rule)
        if unknown := sorted(defaults.keys() - {field.name for field in dataclasses.fields(self)}):
            raise ValueError(
                f"the rule {self.rule} has the hyperparameter {unknown[0]}, which is not a field of OptimConfig: "
                "add it to optim/config.py, or use one of its fields"
            )
        for field in dataclasses.fields(self):
            if field.name in defaults:
                if getattr(self, field.name) is None:
                    object.__setattr__(self, field.name, defaults[field.name])
            elif getattr(self, field.name) != field.default:
                check_belongs(self.rule, field.name)
        if self.full_precision not in get_args(FullPrecision):
            choices = ", ".join(get_args(FullPrecision))
            raise ValueError(f"optim.full_precision must be one of {choices}, not {self.full_precision!r}")
        check_correction(self.correction)
        for name in ("gamma", "sigma", "alpha"):
            if getattr(self, name) is not None:
                self._check_rate(name, getattr(self, name))
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optim.momentum must be in [0, 1), not {self.momentum}")
        if (check := RULES[self.rule].check) is not None:
            check(self.hyperparameters)
        check_transitions(self.transitions, self.rule, getattr(self, self.transitions.drives, None))
        for name in ("init_inertia", "weight_decay"):
            check_is_finite(f"optim.{name}", getattr(self, name))
        if (self.weight_decay > 0.0) != bool(self.decayed):
            raise ValueError("optim.weight_decay and optim.decayed go together: one of them is set without the other")

    def _check_rate(self, name: str, schedule: Schedule) -> None:
        largest = max(schedule.start, schedule.end if schedule.kind in TO_END else 0.0)
        if schedule.kind == "exponential" and schedule.rate > 1.0:
            raise ValueError(f"optim.{name} must not grow by stairs: its rate is {schedule.rate}, expected at most 1")
        if not 0.0 < largest <= 1.0:
            raise ValueError(f"optim.{name} must stay in (0, 1], but reaches {largest}")
        if self.correction != "none" and schedule.kind in TO_END:
            warms_up = schedule.kind == "warmup_cosine" and (schedule.warmup_steps or schedule.warmup_epochs)
            first = 0.0 if warms_up else schedule.start
            for place, value in (("start", first), ("end", schedule.end)):
                if value == 0.0:
                    raise ValueError(
                        f"optim.{name} must not {place} at 0: the correction {self.correction!r} divides by it"
                    )
        if self.correction != "none" and schedule.kind == "exponential" and schedule.rate == 0.0:
            raise ValueError(f"optim.{name}.rate must not be 0: the correction {self.correction!r} divides by it")

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Hyperparameters of the rule by name: a `Schedule`, or a value that stays."""
        return {name: getattr(self, name) for name in defaults_of(self.rule)}


def defaults_of(rule: str) -> Mapping[str, Any]:
    """Return the hyperparameters of `rule` with their defaults.

    Raises:
        ValueError: there is no such rule for binary weights.
    """
    rules = binary_rules()
    if rule not in rules:
        raise ValueError(f"optim.rule must be one of {', '.join(rules)}, not {rule!r}")
    return rules[rule]


def check_belongs(rule: str, name: str) -> None:
    """Raise ValueError if the field `name` of `OptimConfig` is a hyperparameter of other rules, but
    not of `rule`."""
    owners = [owner for owner, names in binary_rules().items() if name in names]
    if owners and rule not in owners:
        raise ValueError(
            f"optim.{name} belongs to {', '.join(owners)}; the rule {rule} has {', '.join(defaults_of(rule))}: "
            f"leave optim.{name} out or choose another optim.rule"
        )


def with_rule(config: OptimConfig, rule: str) -> OptimConfig:
    """Return `config` with another rule: hyperparameters that both rules have are kept, the others
    are dropped.

    Raises:
        ValueError: there is no such rule.
    """
    kept = defaults_of(rule)
    dropped: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.name in defaults_of(config.rule) and field.name not in kept
    }
    return dataclasses.replace(config, rule=rule, **dropped)


def _schedules(config: OptimConfig, num_steps: int) -> dict[str, dict[str, Schedule]]:
    """Return group name -> hyperparameter -> schedule, lengths as in the configuration.

    Args:
        config: rule and schedules.
        num_steps: steps that the run makes, for schedules of the rule itself.
    """
    values = config.hyperparameters
    binary = {name: value for name, value in values.items() if isinstance(value, Schedule)}
    if (further := RULES[config.rule].schedules) is not None:
        binary |= further(values, num_steps)
    return {BINARY: binary, FULL_PRECISION: {"lr": config.lr}, DECAYED: {"lr": config.lr}}


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    *,
    num_steps: int,
    num_epochs: int = 1,
    steps_per_epoch: int | None = None,
    seed: int = 0,
) -> tuple[RoutedOptimizer, dict[str, dict[str, Schedule]]]:
    """Build the optimizer of `model` and the schedules of its groups.

    Args:
        model: its binary weights carry the mark; it may have none, or nothing else.
        config: rule and schedules.
        num_steps: length of the schedules that do not state theirs.
        num_epochs: of the run, for schedules that go by epochs.
        steps_per_epoch: whole batches of an epoch. None: the run is one epoch.
        seed: of state that starts at random.

    Returns:
        The optimizer, whose groups hold the values of step 0, and group name -> hyperparameter ->
        schedule for `HyperparameterScheduler`.

    Raises:
        ValueError: transitions without binary weights, or a schedule that ends before its delay.
    """
    lasting = functools.partial(
        Schedule.over, num_steps=num_steps, num_epochs=num_epochs, steps_per_epoch=steps_per_epoch
    )
    values = config.hyperparameters
    binary: Group = {"rule": config.rule} | {k: v for k, v in values.items() if not isinstance(v, Schedule)}
    if RULES[config.rule].begin_ is not None:
        binary["seed"] = seed
    others: Group = {"rule": config.full_precision, **FULL_PRECISION_DEFAULTS[config.full_precision]}
    settings = {BINARY: binary, FULL_PRECISION: others, DECAYED: {**others, "weight_decay": config.weight_decay}}
    # Whole batches: a phase that begins after the last of them never comes.
    schedules = _schedules(config, num_epochs * steps_per_epoch if steps_per_epoch else num_steps)
    if config.transitions.drives != "off":
        driven = schedules[BINARY].pop(config.transitions.drives)
        binary[config.transitions.drives] = driven.start
        binary[KEY] = target_of(config.transitions, driven, lasting(config.transitions.target))

    groups = [group | settings[group["name"]] for group in param_groups(model, decayed=config.decayed)]
    if config.transitions.drives != "off" and all(group["name"] != BINARY for group in groups):
        raise ValueError(
            f"optim.transitions.drives is {config.transitions.drives!r}, but the model has no binary weights, "
            "whose flips it holds to a target: choose a binarized network, or set it to off"
        )
    optimizer = RoutedOptimizer(groups)
    check_claims(model, optimizer)
    used = {
        group["name"]: {key: lasting(schedule) for key, schedule in schedules[group["name"]].items()}
        for group in optimizer.param_groups
    }
    for group in optimizer.param_groups:  # now, and not before: a schedule may start at 0, a constant must not
        group |= {key: schedule(0) for key, schedule in used[group["name"]].items()}
    return optimizer, used
