"""The seam to timm's registry: its decorator with types, and the arguments it passes to every model function."""

from collections.abc import Callable
from typing import Any, TypeVar

from timm.models import register_model as timm_register_model
from torch import nn

__all__ = ["model_options", "register_model"]

ModelFunction = TypeVar("ModelFunction", bound=Callable[..., nn.Module])


def register_model(function: ModelFunction) -> ModelFunction:
    """Make `timm.create_model(function.__name__)` call `function`."""
    timm_register_model(function)
    return function


def model_options(name: str, pretrained: bool, options: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Constructor arguments of a registered model.

    Args:
        name: name in timm's registry, for the error.
        pretrained: must be False: no weights are published.
        options: keyword arguments of the model function, with what `timm.create_model` adds for its own models.
        defaults: arguments that `options` may override.

    Returns:
        `defaults` updated with the options that are the model's own.
    """
    if pretrained:
        raise ValueError(
            f"{name}: pretrained=True, but no weights are published; train one, or load your own with "
            "checkpoint_path=..."
        )
    timm_only = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return defaults | {key: value for key, value in options.items() if key not in timm_only}
