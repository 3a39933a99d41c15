"""DeepSpeed: its configuration, and the engine that orchestrates the ranks. The only file that imports it."""

import dataclasses
import difflib
import json
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from bitfleet.optim import HyperparameterScheduler, RoutedOptimizer, Schedule, ShardedOptimizer

OWNED = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "global_batch_size and num_replicas",
    "gradient_accumulation_steps": "num_replicas",
    "gradient_clipping": "nothing: clipping would rescale the gradients that the moments average",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "zero_allow_untested_optimizer": "engine.sharding",
}
"""Top-level DeepSpeed keys that bitfleet fills in, and the field that says what with."""

PASSED = (
    "activation_checkpointing aio checkpoint comms_logger communication_data_type compile csv_monitor data_types "
    "disable_allgather dump_state flops_profiler gradient_predivide_factor log_level memory_breakdown "
    "prescale_gradients steps_per_print tensorboard timers wall_clock_breakdown wandb comet "
    "zero_force_ds_cpu_optimizer zero_optimization"
).split()
"""Top-level DeepSpeed keys that a user may set."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How DeepSpeed runs the ranks."""

    sharding: Literal["bits", "none", "zero1", "zero2", "zero3"] = "bits"
    """bits: bitfleet's own sharding (docs/sharding.md), binary weights travel as bits. none: every rank holds all state.
    zero1, zero2, zero3: DeepSpeed's ZeRO shards the optimizer state, the gradients as well, the weights as well."""
    grad_comm_dtype: Literal["fp32", "bf16"] = "fp32"
    """What gradients travel as between the ranks; sums are fp32. For "bits" only."""
    max_grad_norm: float | None = None
    """Clip the gradients of the full-precision parameters (only of those) to this norm. For "bits" only."""
    check_every_steps: int | None = 1000
    """Compare the weights of all ranks every so many steps; a difference stops the job. For "bits" only."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass. Weights, gradients and moments stay fp32."""
    deepspeed: Path | None = None
    """JSON file of further DeepSpeed options (comms_logger, zero_optimization.reduce_bucket_size, ...)."""

    @property
    def stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return {"bits": 0, "none": 0, "zero1": 1, "zero2": 2, "zero3": 3}[self.sharding]

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"engine.max_grad_norm must be positive, not {self.max_grad_norm}")
        if self.check_every_steps is not None and self.check_every_steps < 1:
            raise ValueError(f"engine.check_every_steps must be at least 1, not {self.check_every_steps}")
        if self.sharding != "bits" and (self.max_grad_norm is not None or self.grad_comm_dtype != "fp32"):
            raise ValueError(
                f'engine.max_grad_norm and grad_comm_dtype need engine.sharding "bits", not "{self.sharding}"'
            )


def read_deepspeed_options(path: Path) -> dict[str, Any]:
    """Read a user's DeepSpeed JSON.

    Raises:
        ValueError: no JSON object, or a top-level key that does not exist (DeepSpeed itself ignores those silently).
    """
    try:
        options = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the DeepSpeed options {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the DeepSpeed options {path} are not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"the DeepSpeed options {path} must be a JSON object, not {type(options).__name__}")
    for key in options:
        if key not in PASSED and key not in OWNED:
            near = difflib.get_close_matches(key, [*PASSED, *OWNED], n=1, cutoff=0.0)[0]
            raise ValueError(f'{path}: there is no DeepSpeed option "{key}"; did you mean "{near}"?')
    return options


def merge(owned: dict[str, Any], options: dict[str, Any], path: Path | None, prefix: str = "") -> dict[str, Any]:
    """`options` filled up with what bitfleet owns; a different value for the same key is a ValueError."""
    merged = dict(options)
    for key, value in owned.items():
        name = prefix + key
        if isinstance(value, dict) and isinstance(options.get(key), dict):
            merged[key] = merge(value, options[key], path, name + ".")
        elif key in options and options[key] != value:
            field = OWNED.get(name, "engine.sharding")
            raise ValueError(
                f'{path} sets the DeepSpeed option "{name}" to {options[key]!r}, but the configuration makes it {value!r} '
                f"(the field is {field}): remove it from the file"
            )
        else:
            merged[key] = value
    return merged


def deepspeed_options(
    config: EngineConfig, *, global_batch_size: int, num_replicas: int, world_size: int
) -> dict[str, Any]:
    """The whole dictionary for `deepspeed.initialize`."""
    owned: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": global_batch_size // num_replicas,
        "gradient_accumulation_steps": num_replicas // world_size,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.stage},
    }
    if config.precision == "bf16":
        owned["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    options = read_deepspeed_options(config.deepspeed) if config.deepspeed else {}
    for key in ("optimizer", "scheduler", "bf16", "fp16", *(() if "torch_autocast" in owned else ("torch_autocast",))):
        if key in options:
            raise ValueError(
                f'{config.deepspeed} sets the DeepSpeed option "{key}", which belongs to the field {OWNED[key]}'
            )
    options.setdefault("steps_per_print", 2**31)  # the progress bar prints
    return merge(owned, options, config.deepspeed)


def shard(optimizer: RoutedOptimizer, config: EngineConfig, num_replicas: int) -> RoutedOptimizer | ShardedOptimizer:
    """The optimizer that the engine gets: sharded by bitfleet, or the plain one for DeepSpeed to shard."""
    if config.sharding != "bits":
        return optimizer
    return ShardedOptimizer(
        optimizer,
        num_replicas=num_replicas,
        grad_dtype=torch.bfloat16 if config.grad_comm_dtype == "bf16" else torch.float32,
        max_grad_norm=config.max_grad_norm,
        check_every=config.check_every_steps,
    )


def backward(engine: Any, loss: Tensor, sharding: str) -> None:
    """Backward of a micro-batch; with sharding "bits" the optimizer reduces the gradients and divides by the replicas."""
    if sharding == "bits":
        with engine.no_sync():
            engine.backward(loss, scale_wrt_gas=False)
    else:
        engine.backward(loss)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """`EngineConfig.precision` for forward passes outside of the engine."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def whole_weights(engine: Any) -> AbstractContextManager[None]:
    """Inside, every rank can read all weights: under zero3 they are gathered; every rank enters."""
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(engine.module.parameters()))
    return gathered


def create_engine(
    model: nn.Module,
    optimizer: RoutedOptimizer | ShardedOptimizer,
    schedules: dict[str, dict[str, Schedule]],
    options: dict[str, Any],
    device: torch.device,
) -> Any:
    """Wrap model, optimizer and schedules into a DeepSpeed engine; the process group must exist.

    The engine broadcasts the parameters of rank 0, shards the optimizer, and steps the schedules with the optimizer.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # "You are using ZeRO with an untested optimizer": it is tested here
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's own calls
    # On the CPU, init would compile a C++ collective (25-60 s, fails without a compiler) that gloo does not need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero = options["zero_optimization"]
    if zero["stage"] > 0:
        # The default of 5e8 elements is a buffer of 2 GB that every backward would allocate.
        zero.setdefault("reduce_bucket_size", max(sum(p.numel() for p in model.parameters()), 1))
        zero.setdefault("allgather_bucket_size", zero["reduce_bucket_size"])
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda inner: HyperparameterScheduler(inner, schedules),
            config=options,
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"DeepSpeed refuses the option {name!r} of engine.deepspeed ({error.title}): {first['msg']}"
        ) from error
    return engine


def deepspeed_cpu_adam(param: nn.Parameter) -> torch.optim.Optimizer | None:
    """DeepSpeed's own AdamW for the CPU at a learning rate of 0, to compare with; None where its C++ does not build.

    The first call on a machine compiles for about half a minute.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam([param], lr=0.0, adamw_mode=True)
    except (ImportError, OSError, RuntimeError):
        return None
    return optimizer
