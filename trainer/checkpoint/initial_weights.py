"""Start a run from weights of bitfleet or Keras, and seed the optimizer state for them."""

import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bitfleet.models import ModelConfig, create_model, load_keras_weights
from bitfleet.models.keras.weights import Scales
from bitfleet.models.official_weights import from_official, is_official
from bitfleet.optim import Schedule, Seeding, ShardedOptimizer
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import META, latest_checkpoint, model_signature, verify
from bitfleet.trainer.checkpoint.tensors import BITS, MODEL, Tensors
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.engine import autocast, scaled_loss

ACCEPTED = (
    "a run folder or checkpoint, a file of `bitfleet checkpoint weights` (.safetensors), PyTorch's .pth or .pth.tar, "
    "or Keras' .npz, .h5 or .keras"
)
PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".tar")
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to tensor names."""
SEEDING_STEPS = 8
"""Steps that seed an optimizer's state: they estimate the size of a gradient within a third."""
MAX_SEEDING_STEPS = 40
"""Limit if gradients are not finite: fp16 finds its loss scale in 16 steps."""


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch: every rank builds the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries use the global generator)
    torch.manual_seed(seed)


def load_initial_weights(model: nn.Module, config: ModelConfig, path: Path, scales: Scales, *, new_head: bool) -> None:
    """Load weights from a run, a checkpoint, or a file of bitfleet, PyTorch or Keras.

    A file of PyTorch (.safetensors, or .pth read without running code) may have the names of
    ReActNet's published code.

    Args:
        model: on the CPU.
        config: of `model`.
        path: the file or folder.
        scales: how a Keras file stores the scales of binary kernels.
        new_head: keep the layers whose size depends on the number of classes as they are.

    Raises:
        ValueError: the file is missing, of another kind, or does not fit; names the tensor that
            differs.
    """
    if path.is_dir():
        tensors = _checkpoint_tensors(path)
    elif not path.is_file():
        raise ValueError(f"there is no file of initial weights at {path}: --init takes {ACCEPTED}")
    elif not os.access(path, os.R_OK):
        raise ValueError(f"the initial weights {path} cannot be read: allow this user to read the file")
    elif path.suffix == ".safetensors":
        tensors = _safetensors(path)
    elif path.suffix in PICKLES:
        tensors = _pickled(path)
    elif new_head:
        raise ValueError(f"--init_head new is for weights of bitfleet, not for the Keras file {path}")
    else:
        load_keras_weights(model, path, scales=scales)
        return
    if is_official(model, tensors):
        tensors = from_official(model, tensors)
    _load(model, tensors, config, path, new_head=new_head)


def _checkpoint_tensors(path: Path) -> Tensors:
    """Read the weights of the checkpoint at `path`, or of the newest checkpoint of that run."""
    try:
        checkpoint = path if (path / META).is_file() else latest_checkpoint(path)
        if checkpoint is None:
            raise ValueError("there is no checkpoint in it")
        verify(checkpoint)
        tensors = checkpoint_tensors.read(checkpoint, MODEL, BITS)
    except ValueError as error:
        raise ValueError(f"no weights can be read from {path}: {error}; --init takes {ACCEPTED}") from error
    return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}


def _safetensors(path: Path) -> Tensors:
    try:
        return _unwrapped(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as error:
        raise ValueError(f"the weights {path} are not a safetensors file: {error}") from error


def _pickled(path: Path) -> Tensors:
    """Read a state_dict that `torch.save` wrote, alone or in a dict as "state_dict"."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: unpickling reads whatever the file says
        raise ValueError(
            f"the weights {path} cannot be read without running code that the file may hold "
            f"({(str(error).splitlines() or [''])[0]}): if you trust it, convert it with "
            "safetensors.torch.save_file(torch.load(..., weights_only=False)[...], ...)"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f'the weights {path} are neither a state_dict nor a dict with one as "state_dict"')
    return _unwrapped(state)


def _unwrapped(tensors: Tensors) -> Tensors:
    for prefix in WRAPPERS * 2:  # nested in either order
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _head_names(config: ModelConfig) -> set[str]:
    """Return the names of the tensors whose shapes depend on the number of classes."""
    with torch.device("meta"):
        signature, larger = (
            model_signature(create_model(dataclasses.replace(config, num_classes=count, initial_weights="signs")))
            for count in (config.num_classes, config.num_classes + 1)
        )
    return {name for name, shape in signature.items() if larger[name] != shape}


def _load(model: nn.Module, tensors: Tensors, config: ModelConfig, path: Path, *, new_head: bool) -> None:
    head = _head_names(config) if new_head else set()
    state = model.state_dict()
    for name, shape in model_signature(model).items():
        bits, tensor = BITS + name, tensors.get(name)
        if name in head:
            tensors.pop(bits, None)
            tensors[name] = state[name]
        elif tensor is None and bits in tensors and tensors[bits].numel() == -(-math.prod(shape) // 8):
            tensors[name] = checkpoint_tensors.unpacked(tensors.pop(bits), shape)
        elif tensor is None or list(tensor.shape) != shape:
            there = "missing" if tensor is None else list(tensor.shape)
            hint = "; to train a new classifier for other classes, pass --init_head new"
            raise ValueError(
                f"the weights {path} do not fit: {name} is {there} there and {shape} in this model"
                f"{hint if name in _head_names(config) else ''}"
            )
    if unknown := sorted(set(tensors) - set(state)):
        raise ValueError(f"the weights {path} do not fit: this model has no {unknown[0]}")
    model.load_state_dict(tensors)


def seed_state(
    model: nn.Module,
    sharded: ShardedOptimizer,
    statistics: RunningStatistics,
    batches: Iterator[tuple[Tensor, ...]],
    *,
    normalize: Callable[[Tensor], Tensor],
    loss: Callable[..., tuple[Tensor, Any]],
    precision: str,
    inertia: float,
    num_micro_batches: int,
    num_steps: int,
    schedules: Mapping[str, Mapping[str, Schedule]],
) -> str:
    """Fill a new optimizer's state from gradients of the first steps; every rank calls this.

    Args:
        model: with the weights; they and the running statistics of its BatchNorms stay as they are.
        sharded: its optimizer, before the first step.
        statistics: of the model.
        batches: the first ones of the run, which reads them again: images, and arguments of `loss`
            after the logits.
        normalize: from images to the network's input.
        loss: takes float32 logits; the first value that it returns is minimised.
        precision: of the forward passes.
        inertia: optim.init_inertia.
        num_micro_batches: per step on this rank.
        num_steps: of the run.
        schedules: group name -> hyperparameter -> schedule.

    Returns:
        A sentence about the state. If no gradient is finite it is left empty: the run will skip all
        its steps and say why.
    """
    seeding = Seeding(sharded, inertia=inertia, num_steps=num_steps, schedules=schedules)
    device = next(model.parameters()).device
    model.train()
    for _ in range(min(MAX_SEEDING_STEPS, num_steps)):
        if seeding.num_taken == SEEDING_STEPS:
            break
        for _ in range(num_micro_batches):
            images, *targets = next(batches)
            with statistics.replica():
                with autocast(device, precision):
                    logits: Tensor = model(normalize(images))
                value, _ = loss(logits.float(), *targets)
                torch.autograd.backward(scaled_loss(value, sharded))
        seeding.take()
        statistics.end_step(updated=False)
    if seeding.num_taken == 0:
        return "the state of the optimizer was not seeded: no gradient of the first steps is finite"
    seeding.finish()
    return (
        f"the state of the optimizer was seeded with the gradients of {seeding.num_taken} steps "
        f"(optim.init_inertia {inertia:g})"
    )
