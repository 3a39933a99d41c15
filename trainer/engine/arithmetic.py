"""Set how torch computes on a GPU: the precision of its products, and whether the same inputs give
the same bits.

These are settings of the whole process. On a CPU there is nothing to set: products are fp32 or what
autocast says, and the same number of threads gives the same bits. Not every CPU has instructions
for bf16 and fp16, and then they are slow.
"""

import os
import warnings

import torch

from bitfleet.trainer.engine.config import EngineConfig, resolve_precision


def use_arithmetic(device: torch.device, config: EngineConfig) -> None:
    """Set torch up for the precision and the repeatability of a run.

    Call it before CUDA is used and before the process group exists: cuBLAS reads its environment
    variable when it starts, and in deterministic mode torch keeps NCCL from NVLS, whose sums have
    no fixed order. A later call may change the precision.

    Args:
        device: where the model runs; on a CPU nothing is set.
        config: `precision` and `deterministic` count.

    Raises:
        ValueError: the device does not have that precision.
    """
    precision = resolve_precision(config.precision, device.type)
    if device.type != "cuda":
        return
    # These two names work without a warning in torch 2.11 to 2.14. Their successors
    # (conv.fp32_precision and so on) do too, but then code that still reads these, as torch.compile
    # does, gets an error about mixed settings.
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    # By default a product that is split over the GPU adds its parts in bf16 or fp16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if precision == "fp32":  # torch.compile recommends TF32
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    _use_repeatable(config.deterministic)


def remark_on_precision(precision: str, device_type: str) -> str:
    """Return a sentence about a precision that oneDNN cannot compute on this CPU, so that torch
    does it value by value; "" if there is nothing to say."""
    if device_type != "cpu" or precision not in ("bf16", "fp16") or not torch.backends.mkldnn.is_available():
        return ""
    if getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")():
        return ""
    return (
        f"this CPU ({torch.backends.cpu.get_cpu_capability()}) has no instructions for {precision}: it takes many "
        "times as long as fp32"
    )


def _use_repeatable(deterministic: bool) -> None:
    """Choose algorithms that give the same bits each time, or the fastest ones."""
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # Every operation of bitfleet's networks has a deterministic version; one of another network
    # that has none gets a warning. It also makes torch.compile choose its reductions without timing
    # them: they differ in their order of summation.
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Else it fills every torch.empty, to find bugs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
