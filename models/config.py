"""The network part of a run's configuration."""

import dataclasses
from typing import Any, Literal

import timm
from torch import nn

from bitfleet.models.layers import start_real


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
    """What binary weights are until their first update. real: Glorot's values, as in the paper's code, whose first forward and
    backward pass see them; the first update compares with them and leaves +-1. signs: the signs of such values."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network's training step with torch.compile, which takes 20 to 60 s at the start unless torch's cache has it.
    auto: on GPUs, not on CPUs; a run that is continued stays what it was. Validation is never compiled. The compiled network
    rounds differently, so a run cannot change from one to the other. Not with engine.sharding zero3."""

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"model.num_classes must be at least 1, not {self.num_classes}")


def create_model(config: ModelConfig) -> nn.Module:
    """Build the network with fresh weights from torch's global generator.

    Raises:
        ValueError: no such network, or one that does not take an option.
    """
    names = ("norm", "width", "depths", "binarizer", "residual")
    options: dict[str, Any] = {key: value for key in names if (value := getattr(config, key)) is not None}
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name[:6]}*")[:3] or ["birealnet18", "xnornet", "binarynet"]
        raise ValueError(f"there is no network {config.name!r} (model.name); did you mean one of {', '.join(near)}?")
    try:
        model: nn.Module = timm.create_model(config.name, num_classes=config.num_classes, **options)
    except TypeError as error:
        raise ValueError(
            f"the network {config.name} does not take one of the options {sorted(options)}: {error}"
        ) from error
    if config.initial_weights == "real":
        start_real(model)
    return model
