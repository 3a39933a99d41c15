"""DeepSpeed's configuration: what bitfleet fills in, what a user may add, and what is refused."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, Literal

from bitfleet.trainer.run.user_paths import users_path

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""Precision of convolutions and matrix products (docs/precision.md)."""
AUTOCAST: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
"""Precision -> the dtype of torch that autocast gives to convolutions and matrix products; the
other precisions need none."""

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

NESTED = {
    "activation_checkpointing": "partition_activations number_checkpoints contiguous_memory_optimization "
    "synchronize_checkpoint_boundary profile cpu_checkpointing",
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    "checkpoint": "tag_validation checkpoint_serialization writer load_universal use_node_local_storage parallel_write",
    "data_types": "grad_accum_dtype buffer_dtype",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
}
"""Keys of the sections in which DeepSpeed ignores a misspelt one; in the others it refuses them
itself."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of the ranks and of DeepSpeed."""

    sharding: Literal["bits", "none", "zero1", "zero2", "zero3"] = "bits"
    """bits: bitfleet's own sharding (docs/sharding.md), binary weights travel as bits. none: every
    rank holds all state. zero1, zero2, zero3: DeepSpeed's ZeRO shards the optimizer state, the
    gradients as well, the weights as well."""
    grad_comm_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients travel between the ranks; sums are fp32. bf16 halves the traffic.
    For "bits" only."""
    max_grad_norm: float | None = None
    """Clip the gradients of the full-precision parameters (only of those) to this norm. For "bits"
    only."""
    check_every_steps: int | None = 1000
    """Compare the weights of all ranks every N steps and stop on a difference. (The gather of any
    other step would have repaired it.) For "bits" only."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """Action when a gradient is not finite: skip the step and count it (20 in a row stop the
    run), or save the state before it and stop, naming the parameters. For "bits" only; DeepSpeed's
    ZeRO always skips."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Precision of convolutions and matrix products; weights, gradients and moments stay fp32.
    auto: fp32 on a CPU, tf32 on a GPU, and in a resumed run the precision that it was started with.
    fp32: no TF32 anywhere. tf32: operands rounded to 10 bits, sums in fp32, so that binary layers
    are exact. bf16, fp16: autocast; fp16 only with sharding "bits"."""
    deterministic: bool = True
    """On a GPU: the same inputs give the same bits, as resuming exactly needs. False: algorithms
    are chosen by their time, equal bits are not promised. On a CPU it changes nothing."""
    cuda_graph: bool = False
    """Launch the whole step as two CUDA graphs: for small networks and batches, whose kernels run
    shorter than it takes to launch them. A GPU and a single rank; for "bits" only."""
    collective_timeout_minutes: float = 5.0
    """Minutes that ranks wait for each other, at the start and in every collective, before the job
    fails."""
    deepspeed: Path | None = None
    """JSON file of further DeepSpeed options (comms_logger, zero_optimization.reduce_bucket_size,
    ...)."""

    @property
    def stage(self) -> int:
        """DeepSpeed's ZeRO stage."""
        return {"bits": 0, "none": 0, "zero1": 1, "zero2": 2, "zero3": 3}[self.sharding]

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"engine.max_grad_norm must be positive, not {self.max_grad_norm}")
        if self.check_every_steps is not None and self.check_every_steps < 1:
            raise ValueError(f"engine.check_every_steps must be at least 1, not {self.check_every_steps}")
        if not 0 < self.collective_timeout_minutes <= 1e6:
            raise ValueError(
                f"engine.collective_timeout_minutes must be in (0, 1e6], not {self.collective_timeout_minutes}"
            )
        own = self.max_grad_norm is not None or self.grad_comm_dtype != "fp32" or self.on_nonfinite != "skip"
        if self.sharding != "bits" and (own or self.cuda_graph):
            raise ValueError(
                f"engine.max_grad_norm, grad_comm_dtype, on_nonfinite and cuda_graph need engine.sharding "
                f'"bits", not "{self.sharding}"'
            )
        if self.cuda_graph and self.on_nonfinite == "stop":
            raise ValueError(
                'engine.cuda_graph cannot stop before a step that is not finite: use engine.on_nonfinite "skip"'
            )
        if self.precision == "fp16" and self.on_nonfinite == "stop":
            raise ValueError(
                'engine.precision "fp16" finds its loss scale by steps that are not finite: use '
                'engine.on_nonfinite "skip", or '
                "bf16"
            )
        if self.precision == "fp16" and self.sharding != "bits":
            raise ValueError(
                'engine.precision "fp16" needs engine.sharding "bits", which scales the loss, not '
                f'"{self.sharding}": use bf16'
            )


def resolve_precision(precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"], device_type: str) -> Precision:
    """Return what `EngineConfig.precision` is on a device: "auto" is fp32 on a CPU and tf32 on a
    GPU.

    Args:
        precision: as configured.
        device_type: of the device that the model runs on, "cpu" or "cuda".

    Raises:
        ValueError: the device does not have it.
    """
    if precision == "auto":
        return "tf32" if device_type == "cuda" else "fp32"
    if precision == "tf32" and device_type != "cuda":
        raise ValueError('precision "tf32" is arithmetic of a GPU, and this model runs on the CPU: use fp32 or a GPU')
    return precision


def read_deepspeed_options(path: Path) -> dict[str, Any]:
    """Read a user's DeepSpeed JSON.

    Raises:
        ValueError: no JSON object, or a key that does not exist and that DeepSpeed itself would
            ignore silently.
    """
    try:
        options = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the DeepSpeed options {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the DeepSpeed options {path} are not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"the DeepSpeed options {path} must be a JSON object, not {type(options).__name__}")
    _check_names(options, [*PASSED, *OWNED], path)
    for section, names in NESTED.items():
        if isinstance(options.get(section), dict):
            _check_names(options[section], names.split(), path, section + ".")
    return options


def _check_names(options: dict[str, Any], known: list[str], path: Path, prefix: str = "") -> None:
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f'{path}: there is no DeepSpeed option "{prefix}{key}"; did you mean "{prefix}{near}"?')


def merge(owned: dict[str, Any], options: dict[str, Any], path: Path | None, prefix: str = "") -> dict[str, Any]:
    """`options` filled up with what bitfleet owns; a different value for the same key is a
    ValueError."""
    merged = dict(options)
    for key, value in owned.items():
        name = prefix + key
        if isinstance(value, dict) and isinstance(options.get(key), dict):
            merged[key] = merge(value, options[key], path, name + ".")
        elif key in options and options[key] != value:
            field = OWNED.get(name, "engine.sharding")
            raise ValueError(
                f'{path} sets the DeepSpeed option "{name}" to {options[key]!r}, but the configuration makes it '
                f"{value!r} (the field is {field}): remove it from the file"
            )
        else:
            merged[key] = value
    return merged


def deepspeed_options(
    config: EngineConfig, *, global_batch_size: int, num_replicas: int, world_size: int
) -> dict[str, Any]:
    """Return the whole dictionary for `deepspeed.initialize`."""
    owned: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": global_batch_size // num_replicas,
        "gradient_accumulation_steps": num_replicas // world_size,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.stage},
    }
    if config.precision in AUTOCAST:
        owned["torch_autocast"] = {"enabled": True, "dtype": AUTOCAST[config.precision]}
    options = read_deepspeed_options(config.deepspeed) if config.deepspeed else {}
    for key in ("optimizer", "scheduler", "bf16", "fp16", *(() if "torch_autocast" in owned else ("torch_autocast",))):
        if key in options:
            raise ValueError(
                f'{config.deepspeed} sets the DeepSpeed option "{key}", which belongs to the field {OWNED[key]}'
            )
    options = _with_users_paths(options)
    options.setdefault("steps_per_print", 2**31)  # the progress bar prints
    # On by default, and synchronised: it would drain the GPU twice per micro-batch for a figure
    # that is not read.
    options.setdefault("timers", {"throughput": {"enabled": False}})
    return merge(owned, options, config.deepspeed)


def _with_users_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_users_paths(each) for key, each in value.items()}
    return str(users_path(value)) if isinstance(value, str) and value.startswith("~") else value
