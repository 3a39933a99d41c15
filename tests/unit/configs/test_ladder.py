"""The recipes of ReActNet and QuickNet: what the published code does, counted."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.configs import available, load_config
from bitfleet.optim import Schedule, build_optimizer, param_groups
from bitfleet.optim.param_groups import BINARY, DECAYED, FULL_PRECISION
from bitfleet.trainer.config import TrainConfig

NUM_IMAGES = 1_281_167
QUICKNETS = ("quicknet_small", "quicknet", "quicknet_large")
REACTNETS = ("reactnet18", "reactnet_a")


def model_of(config: TrainConfig) -> nn.Module:
    from bitfleet.models import create_model

    with torch.device("meta"):
        return create_model(config.model)


def groups_of(config: TrainConfig) -> dict[str, list[tuple[str, Tensor]]]:
    return {group["name"]: group["params"] for group in param_groups(model_of(config), decayed=config.optim.decayed)}


def schedules_of(config: TrainConfig) -> Mapping[str, Mapping[str, Schedule]]:
    length: dict[str, Any] = {
        "num_steps": config.epochs * NUM_IMAGES // config.global_batch_size,
        "num_epochs": config.epochs,
        "steps_per_epoch": NUM_IMAGES // config.global_batch_size,
    }
    return build_optimizer(model_of(config), config.optim, **length)[1]


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_elements", "num_others"),
    [
        ("reactnet18_imagenet_stage1", 68, 11_177_984, 526_440),
        # 5 fewer than in the published code, where a 1x1 convolution that doubles channels is two.
        ("reactnet_a_imagenet_stage1", 110 - 5, 28_285_792, 29_343_592 - 28_285_792),
    ],
)
def test_stage_1_decays_what_the_published_code_does(
    name: str, num_tensors: int, num_elements: int, num_others: int
) -> None:
    config = load_config(name)
    groups = groups_of(config)
    decayed = groups[BINARY] + groups[DECAYED]
    assert len(decayed) == num_tensors
    assert sum(param.numel() for _, param in decayed) == num_elements
    assert sum(param.numel() for _, param in groups[FULL_PRECISION]) == num_others
    assert config.optim.weight_decay == config.optim.latent_decay == 1e-5
    assert config.model.initial_weights == "real"


@pytest.mark.parametrize(("network", "batch", "rate"), [("reactnet18", 512, 2.5e-3), ("reactnet_a", 256, 1.25e-3)])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_reactnets_learning_rate_falls_by_epoch_to_0_in_the_last(
    network: str, batch: int, rate: float, stage: str
) -> None:
    config = load_config(f"{network}_imagenet_{stage}")
    assert (config.epochs, config.global_batch_size) == (128, batch)
    steps = NUM_IMAGES // batch
    for name, schedules in schedules_of(config).items():
        lr = schedules["latent_lr" if name == BINARY else "lr"]
        assert lr(0) == lr(steps - 1) == rate * (1 - 1 / 128)
        assert lr(steps) == rate * (1 - 2 / 128)
        assert lr(127 * steps - 1) == rate * (1 - 127 / 128)
        assert lr(127 * steps) == lr(128 * steps - 1) == 0.0


@pytest.mark.parametrize("network", REACTNETS)
def test_stage_2_has_latent_weights_as_published(network: str) -> None:
    config = load_config(f"{network}_imagenet_stage2")
    optim = config.optim
    assert (optim.rule, optim.latent_clip, optim.latent_eps, optim.full_precision) == ("latent_adam", 0.0, 1e-8, "adam")
    assert (optim.weight_decay, optim.decayed, optim.init_inertia) == (0.0, (), 0.0)


@pytest.mark.parametrize("network", QUICKNETS)
def test_quicknets_groups_and_schedules(network: str) -> None:
    config = load_config(f"{network}_imagenet")
    groups, schedules = groups_of(config), schedules_of(config)
    assert groups.keys() == {BINARY, FULL_PRECISION}
    assert len(groups[BINARY]) == {"quicknet_large": 32}.get(network, 16)
    assert len(groups[FULL_PRECISION]) == {"quicknet_small": 50, "quicknet": 50, "quicknet_large": 82}[network]
    for name, key, rate in ((BINARY, "latent_lr", 1e-2), (FULL_PRECISION, "lr", 0.1)):
        lr = schedules[name][key]
        assert lr(0) == 0.0
        assert lr(3124) == rate
        assert lr(374_998) > lr(374_999) == 0.0
    optim = config.optim
    assert (optim.rule, optim.latent_clip, optim.latent_eps) == ("latent_adam", 1.25, 1e-7)
    assert (optim.full_precision, optim.weight_decay) == ("keras_sgd", 0.0)
    assert (config.epochs, config.global_batch_size, config.data.preprocessing) == (600, 2048, "official")
    assert not config.distill.teacher


@pytest.mark.parametrize("name", [name for name in available() if name.startswith("reactnet")])
def test_every_reactnet_has_the_teacher_and_the_lighting(name: str) -> None:
    config = load_config(name)
    assert (config.distill.teacher, config.distill.temperature, config.distill.label_weight) == (
        "resnet34.tv_in1k",
        1,
        0,
    )
    assert config.data.color_lighting
    assert config.data.label_smoothing == 0.0
    assert (config.data.preprocessing, config.data.augmentation) == ("torchvision", "random_resized_crop")


@pytest.mark.parametrize("rule", ["bop2ndorder", "two_ema"])
@pytest.mark.parametrize("network", [*QUICKNETS, *REACTNETS])
def test_one_stage_sees_as_many_images_and_flips_bits(network: str, rule: str) -> None:
    config = load_config(f"{network}_imagenet_{rule}")
    assert config.optim.rule == rule
    assert config.epochs == (600 if network in QUICKNETS else 2 * 128)
    schedules_of(config)
    other = load_config(f"{network}_imagenet" if network in QUICKNETS else f"{network}_imagenet_stage1")
    assert (config.data, config.distill) == (other.data, other.distill)
    if network in QUICKNETS:
        assert (config.optim.full_precision, config.optim.lr) == (other.optim.full_precision, other.optim.lr)
