"""Register networks with timm, and look up the options that a network takes."""

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import timm
from timm.models import FeatureListNet
from timm.models import register_model as timm_register_model
from torch import nn

ModelFunction = TypeVar("ModelFunction", bound=Callable[..., nn.Module])


def register_model(function: ModelFunction) -> ModelFunction:
    """Make `timm.create_model(function.__name__)` call `function`.

    With `features_only=True` timm's FeatureListNet around the network returns a list: the output of
    each stage, or of those in `out_indices`.
    """

    @functools.wraps(function)
    def create(
        pretrained: bool = False, features_only: bool = False, out_indices: Sequence[int] | None = None, **options: Any
    ) -> nn.Module:
        network = function(pretrained, **options)
        if not features_only:
            return network
        stages = getattr(network, "feature_info", None)
        if stages is None:
            raise ValueError(f"{function.__name__}: features_only=True, but it has no stages; use forward_features")
        out_indices = tuple(range(len(stages)) if out_indices is None else out_indices)
        backbone: nn.Module = FeatureListNet(network, out_indices, flatten_sequential=True)
        return backbone

    timm_register_model(create)
    return function


def model_options(name: str, pretrained: bool, options: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return the constructor arguments of a registered network.

    Args:
        name: of the network in timm's registry, for the error.
        pretrained: must be False: no weights are published.
        options: keyword arguments of the model function, with what `timm.create_model` adds for its
            own models.
        defaults: arguments that `options` may override.
    """
    if pretrained:
        raise ValueError(
            f"{name}: pretrained=True, but no weights are published; train one, or load your own with "
            "checkpoint_path=..."
        )
    timm_only = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return defaults | {key: value for key, value in options.items() if key not in timm_only}


def network_options(name: str) -> set[str] | None:
    """Return the keyword arguments of a registered network, or None if its signature does not say.

    A model function with **options passes them to the constructor of the class that it is annotated
    to return.
    """
    function: Callable[..., Any] = timm.model_entrypoint(name)
    options: set[str] = set()
    for target in (function, typing.get_type_hints(function).get("return")):
        if target is None:
            return None
        parameters = inspect.signature(target).parameters.values()
        options |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return options
    return None


def check_sizes(width: int, depths: Sequence[int] = (1,), *, least_width: int = 1) -> None:
    """Raise ValueError unless `width` and all of one or more `depths` are large enough for a
    network."""
    if width < least_width:
        raise ValueError(f"width is {width}; expected at least {least_width}")
    if not depths or min(depths) < 1:
        raise ValueError(f"depths are {depths}; expected one or more numbers of at least 1")
