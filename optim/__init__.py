"""Optimizers for binarized networks: update rules, parameter groups, schedules. Plain PyTorch,
usable in any loop."""

from bitfleet.optim.config import OptimConfig, build_optimizer, with_rule
from bitfleet.optim.param_groups import check_claims, is_binary, param_groups, routing_table
from bitfleet.optim.rules.bnew import bnew_step_
from bitfleet.optim.rules.bop import Bop, bop_step_
from bitfleet.optim.rules.bop2ndorder import Bop2ndOrder, bop2ndorder_step_
from bitfleet.optim.rules.diode import diode_step_
from bitfleet.optim.rules.latent import latent_adam_step_, latent_sgd_step_
from bitfleet.optim.rules.rule import RULES, RoutedOptimizer, Rule, binary_rules, register
from bitfleet.optim.rules.sgdat import sgdat_step_
from bitfleet.optim.rules.two_ema import two_ema_step_
from bitfleet.optim.schedules import HyperparameterScheduler, Schedule, constant, linear
from bitfleet.optim.sharding.optimizer import ShardedOptimizer
from bitfleet.optim.sharding.seeding import Seeding
from bitfleet.optim.transitions import TransitionConfig, driven_values

__all__ = [
    "RULES",
    "Bop",
    "Bop2ndOrder",
    "HyperparameterScheduler",
    "OptimConfig",
    "RoutedOptimizer",
    "Rule",
    "Schedule",
    "Seeding",
    "ShardedOptimizer",
    "TransitionConfig",
    "binary_rules",
    "bnew_step_",
    "bop2ndorder_step_",
    "bop_step_",
    "build_optimizer",
    "check_claims",
    "constant",
    "diode_step_",
    "driven_values",
    "is_binary",
    "latent_adam_step_",
    "latent_sgd_step_",
    "linear",
    "param_groups",
    "register",
    "routing_table",
    "sgdat_step_",
    "two_ema_step_",
    "with_rule",
]
