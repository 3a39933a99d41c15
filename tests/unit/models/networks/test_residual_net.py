"""Networks with shortcuts have the methods of timm's networks, and are backbones."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import bitfleet.models  # noqa: F401  registers the networks
from bitfleet.optim import param_groups

SMALL: dict[str, dict[str, Any]] = {
    "birealnet18": {"width": 8},
    "birealnet_small": {"residual": "single"},
    "reactnet18": {"width": 8},
    "reactnet_small": {},
    "reactnet_a": {"width": 4},
    "quicknet_small": {"width": 8},
    "real_to_binary": {"width": 8},
    "binary_resnet_e18": {"width": 8, "stem": "small"},
}
parametrize = pytest.mark.parametrize("name", SMALL)


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name], **options)


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@parametrize
def test_the_head_follows_the_features(name: str) -> None:
    network = build(name, num_classes=7).eval()
    features = network.forward_features(images())
    assert features.shape[:2] == (2, network.num_features)
    assert torch.equal(network.forward_head(features), network(images()))
    before = network.forward_head(features, pre_logits=True)
    assert torch.equal(network.get_classifier()(before), network(images()))


@parametrize
def test_without_classes_it_returns_what_the_head_would_get(name: str) -> None:
    network = build(name, num_classes=7).eval()
    expected = network.forward_head(network.forward_features(images()), pre_logits=True)
    headless = build(name, num_classes=0).eval()
    assert torch.equal(headless(images()), expected)
    network.reset_classifier(0)
    assert torch.equal(network(images()), expected)
    assert list(network.state_dict()) == list(headless.state_dict())


@parametrize
def test_new_classes_change_only_the_head(name: str) -> None:
    network = build(name, num_classes=7)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.reset_classifier(5)
    assert network.num_classes == 5
    assert network(images()).shape == (2, 5)
    after = build(name, num_classes=5).state_dict()
    assert {key: value.shape for key, value in network.state_dict().items()} == {k: v.shape for k, v in after.items()}
    weights = [key for key, _ in network.named_parameters() if not key.startswith("head.")]
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in weights)


def test_a_new_head_lies_where_the_network_is() -> None:
    network = build("birealnet_small").to("meta", torch.float64)
    network.reset_classifier(5)
    assert network.head.weight.device.type == "meta"
    assert network.head.weight.dtype == torch.float64


@parametrize
def test_a_backbone_returns_the_output_of_each_stage(name: str) -> None:
    network, backbone = build(name).eval(), build(name, features_only=True).eval()
    outputs = backbone(images())
    assert [output.shape[1] for output in outputs] == backbone.feature_info.channels()
    assert [64 // output.shape[2] for output in outputs] == backbone.feature_info.reduction()
    assert torch.equal(outputs[-1], network.forward_features(images()))
    binary = [
        len(group["params"]) for net in (network, backbone) for group in param_groups(net) if group["name"] == "binary"
    ]
    assert binary[0] == binary[1]


def test_a_backbone_of_chosen_stages_trains_no_others() -> None:
    backbone = build("quicknet_small", features_only=True, out_indices=(0, 2))
    outputs = backbone(images())
    assert [output.shape[1] for output in outputs] == backbone.feature_info.channels() == [8, 64]
    sum(output.sum() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_a_trained_network_becomes_a_backbone(tmp_path: Path) -> None:
    save_file(build("birealnet18").state_dict(), tmp_path / "weights.safetensors")
    network = build("birealnet18", checkpoint_path=tmp_path / "weights.safetensors").eval()
    backbone = timm.models.FeatureListNet(network, (1, -1), flatten_sequential=True)
    middle, last = backbone(images())
    assert middle.shape == (2, 16, 8, 8)
    assert torch.equal(last, network.forward_features(images()))


@parametrize
def test_it_can_be_pickled(name: str) -> None:
    network = build(name).eval()
    assert torch.equal(pickle.loads(pickle.dumps(network))(images()), network(images()))
