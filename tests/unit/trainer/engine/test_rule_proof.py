from typing import Any

import pytest
import torch
from torch import nn

from bitfleet.optim import OptimConfig, RoutedOptimizer, ShardedOptimizer, build_optimizer
from bitfleet.optim.param_groups import BINARY, FULL_PRECISION
from bitfleet.trainer.engine import rule_proof
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.engine.rule_proof import RuleProof

pytestmark = pytest.mark.usefixtures("process_group")


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(9, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    for layer in (model[0], model[1]):
        layer.weight.data = torch.where(layer.weight >= 0, 1.0, -1.0)
        layer.weight.binary = True
    return model


def optimizer_of(model: nn.Module, sharding: str) -> RoutedOptimizer | ShardedOptimizer:
    plain, _ = build_optimizer(model, OptimConfig(rule="bop"), num_steps=10)
    return ShardedOptimizer(plain) if sharding == "bits" else plain


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(3, 9)).sum().backward()
    optimizer.step()


def prove(model: nn.Module, optimizer: RoutedOptimizer | ShardedOptimizer, sharding: Any, rule: str = "bop") -> str:
    proof = RuleProof(model, rule, EngineConfig(sharding=sharding))
    proof.begin(optimizer)
    step(model, optimizer)
    return proof.end(optimizer, 1)


@pytest.mark.parametrize("sharding", ["bits", "none"])
def test_every_binary_weight_is_counted_once_and_nothing_afterwards(sharding: str) -> None:
    model = network()
    optimizer = optimizer_of(model, sharding)
    assert prove(model, optimizer, sharding) == "step 1: bop updated all 2 binary weights, 136 elements"
    assert optimizer.counts is None
    step(model, optimizer)


@pytest.mark.parametrize("sharding", ["bits", "none"])
def test_a_weight_left_out_of_the_groups_is_named(sharding: str) -> None:
    model = network()
    plain, _ = build_optimizer(model, OptimConfig(rule="bop"), num_steps=10)
    binary = next(group for group in plain.param_groups if group["name"] == BINARY)
    binary["params"], binary["param_names"] = binary["params"][:1], binary["param_names"][:1]
    optimizer = ShardedOptimizer(plain) if sharding == "bits" else plain
    with pytest.raises(ValueError, match=r"1\.weight has 64 elements to be updated by bop in step 1, and none were"):
        prove(model, optimizer, sharding)


@pytest.mark.parametrize("sharding", ["bits", "none"])
def test_a_weight_that_another_rule_updates_is_named(sharding: str) -> None:
    model = network()
    plain, _ = build_optimizer(model, OptimConfig(rule="bop"), num_steps=10)
    groups = {group["name"]: group for group in plain.param_groups}
    for key in ("params", "param_names"):
        groups[FULL_PRECISION][key].append(groups[BINARY][key].pop(0))
    optimizer = ShardedOptimizer(plain) if sharding == "bits" else plain
    with pytest.raises(ValueError, match=r"0\.weight has 72 elements .* and 72 by keras_adam were"):
        prove(model, optimizer, sharding)


def test_a_weight_that_the_network_does_not_use_is_named() -> None:
    model = network()
    model.add_module("unused", nn.Linear(8, 8, bias=False))
    model.unused.weight.data.fill_(1.0)
    model.unused.weight.binary = True  # type: ignore[attr-defined]
    forward = model[:3]
    optimizer = optimizer_of(model, "none")
    proof = RuleProof(model, "bop", EngineConfig(sharding="none"))
    proof.begin(optimizer)
    forward(torch.ones(3, 9)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"unused\.weight .* and none were"):
        proof.end(optimizer, 1)


def test_frozen_weights_and_networks_without_binary_ones_are_said() -> None:
    model = network()
    model[1].weight.requires_grad_(False)
    assert prove(model, optimizer_of(model, "bits"), "bits").endswith(
        "all 1 binary weights, 72 elements; 1 more are frozen"
    )
    model = nn.Sequential(nn.Linear(9, 2))
    assert prove(model, optimizer_of(model, "bits"), "bits") == "step 1: the network has no binary weights to update"


@pytest.mark.parametrize(("missing", "rule"), [(3, "bop"), (0, "keras_adam")])
def test_slices_without_names_are_counted_together(missing: int, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed gives each of two ranks a flat slice, filled up to 70 elements."""
    model = network()
    flat = nn.Parameter(torch.ones(70))
    optimizer = RoutedOptimizer([{"params": [flat], "rule": "bop", "gamma": 0.1, "threshold": 0.1, "name": BINARY}])
    optimizer.param_groups[0]["params"] = [replaced := nn.Parameter(torch.ones(70 - missing))]
    replaced.grad = torch.ones(70 - missing)
    proof = RuleProof(model, rule, EngineConfig(sharding="zero1"))
    proof.begin(optimizer)
    optimizer.step()
    monkeypatch.setattr(rule_proof, "all_gather_objects", lambda elements: [elements, elements])
    with pytest.raises(ValueError, match=r"0\.weight on have 136 elements .* and 1\d\d by bop were"):
        proof.end(optimizer, 1)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(70))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(70)
    proof = RuleProof(model, "bop", EngineConfig(sharding="zero1"))
    proof.begin(optimizer)
    optimizer.step()
    assert "136 elements, counted together" in proof.end(optimizer, 1)
