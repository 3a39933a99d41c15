"""Networks without shortcuts have the methods of timm's networks."""

import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import bitfleet.models  # noqa: F401  registers the networks

SIDES = {"binarynet": 32, "xnornet": 224, "binary_alexnet": 224}
parametrize = pytest.mark.parametrize("name", SIDES)


def build(name: str, num_classes: int) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes, **({"width": 8} if name == "binarynet" else {})).eval()


def images(name: str) -> Tensor:
    return torch.randn(1, 3, SIDES[name], SIDES[name], generator=torch.Generator().manual_seed(0))


@parametrize
def test_last_layers_can_be_left_out_and_replaced(name: str) -> None:
    network, x = build(name, 7), images(name)
    features = network.forward_features(x)
    before = network.forward_head(features, pre_logits=True)
    assert before.shape == (1, network.num_features)
    assert torch.equal(network.get_classifier()(before), network(x))
    assert torch.equal(build(name, 0)(x), before)
    network.reset_classifier(0)
    assert isinstance(network.get_classifier(), nn.Identity)
    assert torch.equal(network(x), before)
    network.reset_classifier(5)
    assert network(x).shape == (1, 5)
    assert network.num_classes == 5
    assert not any(module.training for module in network.modules())


def test_new_last_layers_are_binary_where_the_old_ones_were() -> None:
    network = build("binarynet", 7)
    network.reset_classifier(5)
    weight = network.get_classifier()[0].weight
    assert weight.binary
    assert bool((weight.abs() == 1).all())


def test_no_stages() -> None:
    with pytest.raises(ValueError, match=r"binarynet: features_only=True.*no stages.*forward_features"):
        timm.create_model("binarynet", features_only=True)


def test_it_can_be_pickled() -> None:
    network, x = build("binarynet", 7), images("binarynet")
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))
