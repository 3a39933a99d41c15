"""Compile a network in place: parameter names, checkpoints and hooks stay as they are."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def compile_network(model: nn.Module) -> None:
    """Compile `model` when it is first called; if that fails, warn once and run it eagerly.

    Shapes are static: another batch size compiles again (`torch.compiler.set_stance("force_eager")`
    avoids that). The first call takes 20 to 60 s of a CPU core; later ones, also in other
    processes, find most in torch's cache.

    Args:
        model: one of bitfleet's networks, which compiles to one graph, or to one per submodule
            named in its `compiled_apart`; or any other, whose graph may have breaks.
    """
    ours = type(model).__module__.startswith("bitfleet.")
    names: Sequence[str] = getattr(model, "compiled_apart", ())
    for part in [model.get_submodule(name) for name in names] or [model]:
        # The forward method, not the module: DeepSpeed's hooks count steps, and each count would be
        # compiled again.
        part.forward = torch.compile(part.forward, fullgraph=ours, dynamic=False, backend=_inductor_or_eager)


def problem_of_compiling(device: torch.device) -> str:
    """Return why torch.compile does not work for `device` here (usually: no compiler), or ""."""
    try:
        torch.compile(_probe, fullgraph=True, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: missing compilers, headers, Triton
        return _reason(error)
    return ""


def _probe(x: Tensor) -> Tensor:
    return x * 2 + 1


def _inductor_or_eager(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Backend of torch.compile that never fails."""
    try:
        compiled: Callable[..., Any] = torch._inductor.compile(graph, list(inputs))
    except Exception as error:
        warnings.warn(
            f"the network runs in eager torch, slower: it does not compile: {_reason(error)}", RuntimeWarning, 2
        )
        return graph
    return compiled


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
