"""The network of a configuration."""

import dataclasses
import difflib
from typing import Literal

import timm
import torch
from torch import nn

from bitfleet.models.layers.layers import start_real
from bitfleet.models.registry import network_options


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A network in timm's registry: one of bitfleet's, or any other.

    Fields whose default is None are options of networks: they are passed to the network unless they
    are None.
    """

    name: str = "birealnet18"
    """Name in timm's registry."""
    num_classes: int = 1000
    """Number of classes."""
    norm: Literal["batch", "layer", "none"] | None = None
    """Normalization; none (Bi-Real Nets): only factor and offset. None: the network's default."""
    width: int | None = None
    """Channels of the first stage of a Bi-Real Net, ReActNet, QuickNet or BinaryNet. None: the
    network's default."""
    depths: tuple[int, ...] | None = None
    """Binary convolutions per stage of a Bi-Real Net, ReActNet-18 or QuickNet. None: the network's
    default."""
    binarizer: Literal["ste", "wide_ste", "approx", "hardtanh_tanh"] | None = None
    """Pseudo-gradient of the sign of the features. None: the network's default."""
    residual: Literal["single", "double"] | None = None
    """Shortcuts of a Bi-Real Net around each two convolutions, or each. None: the default."""
    initial_weights: Literal["signs", "real"] = "signs"
    """Binary weights until their first update. real: Glorot's values, as in the paper's code; the
    first forward and backward pass see them, and the first update turns them into +-1. signs: the
    signs of such values."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network's training step with torch.compile, which takes 20 to 60 s at the start
    unless it is in torch's cache. auto: on GPUs, not on CPUs; a resumed run stays as it was.
    Validation is never compiled. A compiled network rounds differently, so a run cannot switch. Not
    with engine.sharding zero3."""

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"model.num_classes must be at least 1, not {self.num_classes}")
        if self.width is not None and self.width < 1:
            raise ValueError(f"model.width must be at least 1, not {self.width}")
        if self.depths is not None and (not self.depths or min(self.depths) < 1):
            raise ValueError(
                f"model.depths must be one or more numbers of at least 1, not {self.depths}; None is the "
                "network's default"
            )


def create_model(config: ModelConfig) -> nn.Module:
    """Build the network with initial weights from torch's global generator.

    Raises:
        ValueError: the network does not exist, or does not take an option.
    """
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.default is None}
    options = {name: value for name, value in options.items() if value is not None}
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models()) or timm.list_models("birealnet*")
        raise ValueError(f"there is no network {config.name!r} (model.name); did you mean one of {', '.join(near)}?")
    accepted = network_options(config.name)
    if refused := [name for name in options if accepted is not None and name not in accepted]:
        unset = " ".join(f"--model.{name} None" for name in refused)
        raise ValueError(
            f"the network {config.name} does not take the options {', '.join(refused)}: leave them to it with {unset}"
        )
    try:
        model: nn.Module = timm.create_model(config.name, num_classes=config.num_classes, **options)
    except TypeError as error:
        if not options:
            raise
        raise ValueError(
            f"the network {config.name} does not take one of the options {', '.join(options)} ({error}): "
            f"leave that one to it, as with --model.{next(iter(options))} None"
        ) from error
    if config.initial_weights == "real":
        start_real(model)
    return model


def check_images(config: ModelConfig, image_size: int, batch_size: int) -> None:
    """Raise ValueError unless the network can train on `batch_size` images of `image_size` pixels.

    It is tried on the meta device, which computes nothing.
    """
    _forward(config, image_size, 2)
    if batch_size == 1:
        _forward(config, image_size, 1)


def _forward(config: ModelConfig, image_size: int, batch_size: int) -> None:
    for device in ("meta", "cpu"):  # a network may need values, which "meta" lacks
        try:
            with torch.device(device):
                model = create_model(config)
                model(torch.zeros(batch_size, 3, image_size, image_size))
                return
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"a batch normalization of {config.name} has a single value per channel with {batch_size} image at a "
                "time (global_batch_size / num_replicas): raise --global_batch_size, lower --num_replicas, or use "
                "--model.norm layer if the network has it"
            ) from error
        except (RuntimeError, AssertionError) as error:
            if "DefaultCPUAllocator" in str(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f"the network {config.name} cannot take images of {image_size}x{image_size} pixels: {reason}")
