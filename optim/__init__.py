"""Optimizers for binarized networks: update rules, parameter groups, schedules. Plain PyTorch, usable in any loop."""

from bitfleet.optim import adam as _adam  # noqa: F401  (registers the rule keras_adam)
from bitfleet.optim.bop import Bop, bop_step_
from bitfleet.optim.bop2ndorder import Bop2ndOrder, bop2ndorder_step_
from bitfleet.optim.config import OptimConfig, build_optimizer
from bitfleet.optim.param_groups import check_claims, is_binary, param_groups, routing_table
from bitfleet.optim.routed import RoutedOptimizer
from bitfleet.optim.schedules import HyperparameterScheduler, Schedule, constant, linear
from bitfleet.optim.sharding import ShardedOptimizer

__all__ = [
    "Bop",
    "Bop2ndOrder",
    "HyperparameterScheduler",
    "OptimConfig",
    "RoutedOptimizer",
    "Schedule",
    "ShardedOptimizer",
    "bop2ndorder_step_",
    "bop_step_",
    "build_optimizer",
    "check_claims",
    "constant",
    "is_binary",
    "linear",
    "param_groups",
    "routing_table",
]
