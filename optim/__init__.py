"""Optimizers for binarized networks: update rules, parameter groups, schedules. Plain PyTorch, usable in any loop."""

from bitfleet.optim.bnew import bnew_step_
from bitfleet.optim.bop import Bop, bop_step_
from bitfleet.optim.bop2ndorder import Bop2ndOrder, bop2ndorder_step_
from bitfleet.optim.config import HYPERPARAMETERS, OptimConfig, build_optimizer, with_rule
from bitfleet.optim.diode import Diode, diode_step_
from bitfleet.optim.latent import LatentAdam, LatentSgd, latent_adam_step_, latent_sgd_step_
from bitfleet.optim.param_groups import check_claims, is_binary, param_groups, routing_table
from bitfleet.optim.routed import RoutedOptimizer
from bitfleet.optim.schedules import HyperparameterScheduler, Schedule, constant, linear
from bitfleet.optim.seeding import Seeding
from bitfleet.optim.sgdat import Sgdat, sgdat_step_
from bitfleet.optim.sharding import ShardedOptimizer
from bitfleet.optim.transitions import TransitionConfig, driven_values
from bitfleet.optim.two_ema import TwoEma, two_ema_step_

__all__ = [
    "HYPERPARAMETERS",
    "Bop",
    "Bop2ndOrder",
    "Diode",
    "HyperparameterScheduler",
    "LatentAdam",
    "LatentSgd",
    "OptimConfig",
    "RoutedOptimizer",
    "Schedule",
    "Seeding",
    "Sgdat",
    "ShardedOptimizer",
    "TransitionConfig",
    "TwoEma",
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
    "routing_table",
    "sgdat_step_",
    "two_ema_step_",
    "with_rule",
]
