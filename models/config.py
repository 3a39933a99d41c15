"""The network part of a run's configuration."""

import dataclasses
import re
from typing import Any, Literal

import timm
import torch
from torch import nn

from bitfleet.models.layers.layers import start_real

OPTIONS = ("norm", "width", "depths", "binarizer", "residual")
"""Fields of `ModelConfig` that go to the network unless they are None."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A network of timm's registry: one of bitfleet's, or any other."""

    name: str = "birealnet18"
    """Name in timm's registry."""
    num_classes: int = 1000
    """Outputs of the classifier."""
    norm: Literal["batch", "layer", "none"] | None = None
    """Normalisation of bitfleet's networks; none (Bi-Real Nets): a factor and an offset alone. None: the network's default."""
    width: int | None = None
    """Channels of the first stage of a Bi-Real Net. None: the network's own default."""
    depths: tuple[int, ...] | None = None
    """Binary convolutions in each stage of a Bi-Real Net. None: the network's own default."""
    binarizer: Literal["ste", "approx", "hardtanh_tanh"] | None = None
    """Pseudo-gradient of the sign of the features in bitfleet's networks. None: the network's own default."""
    residual: Literal["single", "double"] | None = None
    """Shortcuts of a Bi-Real Net: around every two binary convolutions, or around every one. None: the network's own default."""
    initial_weights: Literal["signs", "real"] = "signs"
    """Binary weights until their first update. real: Glorot's values, as in the paper's code, whose first forward and
    backward pass see them; the first update compares with them and leaves +-1. signs: the signs of such values."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network's training step with torch.compile, which takes 20 to 60 s at the start unless torch's cache has it.
    auto: on GPUs, not on CPUs; a run that is continued stays what it was. Validation is never compiled. The compiled network
    rounds differently, so a run cannot change from one to the other. Not with engine.sharding zero3."""

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"model.num_classes must be at least 1, not {self.num_classes}")
        if self.width is not None and self.width < 1:
            raise ValueError(f"model.width must be at least 1, not {self.width}")
        if self.depths is not None and (not self.depths or min(self.depths) < 1):
            raise ValueError(
                f"model.depths must be one number or more, each at least 1, not {self.depths}; None is the network's own"
            )


def create_model(config: ModelConfig) -> nn.Module:
    """Build the network with fresh weights from torch's global generator.

    Raises:
        ValueError: no such network, or one that does not take an option.
    """
    options: dict[str, Any] = {key: value for key in OPTIONS if (value := getattr(config, key)) is not None}
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name[:6]}*")[:3] or ["birealnet18", "xnornet", "binarynet"]
        raise ValueError(f"there is no network {config.name!r} (model.name); did you mean one of {', '.join(near)}?")
    try:
        model: nn.Module = timm.create_model(config.name, num_classes=config.num_classes, **options)
    except TypeError as error:
        refused = _refused_options(config, options)
        if not refused:
            raise
        unset = " ".join(f"--model.{name} None" for name in refused)
        raise ValueError(
            f"the network {config.name} does not take one of the options {sorted(options)}: leave {', '.join(refused)} to it "
            f"with {unset}"
        ) from error
    if config.initial_weights == "real":
        start_real(model)
    return model


def _refused_options(config: ModelConfig, options: dict[str, Any]) -> list[str]:
    """Return the names of `options` that the network does not know."""
    refused: list[str] = []
    while True:
        taken = {name: value for name, value in options.items() if name not in refused}
        try:
            with torch.device("meta"):
                timm.create_model(config.name, num_classes=config.num_classes, **taken)
        except TypeError as error:
            match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if match is None or match[1] not in taken:
                return refused
            refused.append(match[1])
        else:
            return refused


def check_images(config: ModelConfig, image_size: int, batch_size: int) -> None:
    """Raise ValueError unless the network can be trained on batches of square images; nothing is computed if it can.

    Args:
        config: of the network.
        image_size: pixels of a side.
        batch_size: images that go through it at a time.
    """
    _forward(config, image_size, 2)
    if batch_size == 1:
        _forward(config, image_size, 1)


def _forward(config: ModelConfig, image_size: int, batch_size: int) -> None:
    for device in ("meta", "cpu"):  # a network may need values, which "meta" does not have
        try:
            with torch.device(device):
                model = create_model(config)
                model(torch.zeros(batch_size, 3, image_size, image_size))
                return
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"a batch normalization of {config.name} has a single value per channel where {batch_size} image goes through it "
                f"at a time (global_batch_size / num_replicas): raise --global_batch_size, lower --num_replicas, or use "
                f"--model.norm layer if the network has it"
            ) from error
        except (RuntimeError, AssertionError) as error:
            if "DefaultCPUAllocator" in str(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f"the network {config.name} cannot take images of {image_size}x{image_size} pixels: {reason}")
