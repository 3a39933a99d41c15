"""Create and use DeepSpeed's engine, which orchestrates the ranks. The only file of trainer/ that
imports DeepSpeed."""

import difflib
import logging
import os
import pickle
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitfleet.optim import HyperparameterScheduler, RoutedOptimizer, Schedule, ShardedOptimizer
from bitfleet.trainer.engine.config import AUTOCAST, EngineConfig


def shard(optimizer: RoutedOptimizer, config: EngineConfig, num_replicas: int) -> RoutedOptimizer | ShardedOptimizer:
    """Return the optimizer for the engine: sharded by bitfleet, or the plain one for DeepSpeed to
    shard."""
    if config.sharding != "bits":
        return optimizer
    return ShardedOptimizer(
        optimizer,
        num_replicas=num_replicas,
        grad_dtype=torch.bfloat16 if config.grad_comm_dtype == "bf16" else torch.float32,
        max_grad_norm=config.max_grad_norm,
        check_every=config.check_every_steps,
        defers=False if config.on_nonfinite == "stop" else None,
        scales_loss=config.precision == "fp16",
    )


def backward(engine: Any, loss: Tensor, optimizer: Optimizer) -> None:
    """Run the backward pass of a micro-batch; a `ShardedOptimizer` reduces the gradients and
    divides by the replicas itself."""
    if isinstance(optimizer, ShardedOptimizer):
        with engine.no_sync():
            engine.backward(scaled_loss(loss, optimizer), scale_wrt_gas=False)
    else:
        engine.backward(loss)


def scaled_loss(loss: Tensor, optimizer: ShardedOptimizer) -> Tensor:
    """Return what backward starts from: under fp16 the loss times its scale."""
    scale = optimizer.loss_scale
    return loss if scale is None else loss * scale.value


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of `EngineConfig.precision`, for forward passes outside of the
    engine."""
    dtype: torch.dtype = getattr(torch, AUTOCAST.get(precision, "bfloat16"))
    return torch.autocast(device.type, dtype, enabled=precision in AUTOCAST)


def whole_weights(engine: Any) -> AbstractContextManager[None]:
    """Give every rank all weights inside: under zero3 they are gathered; every rank enters."""
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

    The engine broadcasts the parameters of rank 0, shards the optimizer, and steps the schedules
    with the optimizer.

    Raises:
        ValueError: an option that DeepSpeed refuses, or a device that it would not use.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # "You are using ZeRO with an untested optimizer": it is tested here
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's own calls
    # On the CPU, init would compile a C++ collective (25-60 s, fails without a compiler) that gloo
    # does not need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero = options["zero_optimization"]
    if zero["stage"] > 0:
        # The default of 5e8 elements is a buffer of 2 GB that every backward would allocate.
        zero.setdefault("reduce_bucket_size", max(sum(p.numel() for p in model.parameters()), 1))
        zero.setdefault("allgather_bucket_size", zero["reduce_bucket_size"])
    place = _place(device, zero["stage"])
    try:
        engine, *_ = deepspeed.initialize(
            args=place,
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda inner: HyperparameterScheduler(inner, schedules),
            config=options,
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        fields = [
            field for each in _models(pydantic.BaseModel) if each.__name__ == error.title for field in each.model_fields
        ]
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6) if first["type"] == "extra_forbidden" else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"DeepSpeed refuses the option {name!r} of engine.deepspeed ({error.title}): {first['msg']}{hint}"
        ) from error
    # For fp16 DeepSpeed makes a torch.amp.GradScaler, whose step waits for the GPU. With sharding
    # "bits" the optimizer scales.
    engine.torch_autocast_z0_gradscaler = None
    return engine


def _place(device: torch.device, stage: int) -> SimpleNamespace | None:
    """Return the argument that keeps DeepSpeed from using GPU number LOCAL_RANK, which a rank that
    sees one GPU does not have.

    Raises:
        ValueError: ZeRO 3 asks the environment again and again.
    """
    if device.index is None:
        return None
    local_rank = os.environ["LOCAL_RANK"]
    if stage == 3 and local_rank != str(device.index):
        raise ValueError(
            f'engine.sharding "zero3" uses GPU number LOCAL_RANK, which is {local_rank}, but this rank sees its '
            f"GPU as number {device.index}: let every rank see all GPUs of its machine (srun without --gpus-per-task), "
            "or use another sharding"
        )
    return SimpleNamespace(device_rank=device.index)


def _models(base: type[pydantic.BaseModel]) -> list[type[pydantic.BaseModel]]:
    return [base, *(each for child in base.__subclasses__() for each in _models(child))]


def load_engine(engine: Any, checkpoint: Path, tag: str) -> None:
    """Load DeepSpeed's own shards, on as many ranks as wrote them; every rank calls this.

    DeepSpeed unpickles any object in a file. Here only tensors and the few plain classes of its own
    files are allowed.

    Raises:
        ValueError: a file holds anything else.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class TensorsOnly(TorchCheckpointEngine):  # type: ignore[misc]  # deepspeed is untyped
        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(_plain_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)

    before, engine.checkpoint_engine = engine.checkpoint_engine, TensorsOnly()
    try:
        loaded, _ = engine.load_checkpoint(str(checkpoint), tag=tag)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the checkpoint {checkpoint} holds more than tensors and is not loaded: {reason}") from error
    finally:
        engine.checkpoint_engine = before
    assert loaded is not None, checkpoint


def _plain_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
