"""Weights to begin a run from: random ones, our own file or run, or a file that Keras wrote."""

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from bitfleet.models import ModelConfig, create_model, load_keras_weights
from bitfleet.models.keras.weights import Scales
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import latest_checkpoint, model_signature, verify
from bitfleet.trainer.checkpoint.tensors import BITS, MODEL, Tensors

ACCEPTED = (
    "a run folder or checkpoint, a file of `bitfleet checkpoint weights` (.safetensors), or Keras' .npz, .h5 or .keras"
)
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the names of a network's tensors."""


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch; every rank builds the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries use the global generator)
    torch.manual_seed(seed)


def load_initial_weights(model: nn.Module, config: ModelConfig, path: Path, scales: Scales, *, new_head: bool) -> None:
    """Fill `model` from a run, a checkpoint, a .safetensors file (binary weights packed or not) or a file of Keras.

    Args:
        model: on the CPU.
        config: that it was made from.
        path: the file or folder.
        scales: how a Keras file has the scales of binary kernels.
        new_head: leave the layers that depend on the number of classes as they are.

    Raises:
        ValueError: the file is missing, of another kind, or does not fit; the tensor that differs is named.
    """
    if path.is_dir():
        tensors = _of_checkpoint(path)
    elif not path.is_file():
        raise ValueError(f"there is no file of initial weights at {path}: --init takes {ACCEPTED}")
    elif path.suffix == ".safetensors":
        tensors = _of_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
        raise ValueError(
            f"the weights {path} are a pickle of PyTorch, which can run any code as it is read: --init takes {ACCEPTED}; "
            f"safetensors.torch.save_file(torch.load(...)) writes one of tensors whose names fit"
        )
    elif new_head:
        raise ValueError(f"--init_head new is for weights of bitfleet, not for the Keras file {path}")
    else:
        load_keras_weights(model, path, scales=scales)
        return
    _load(model, tensors, _names_of_head(config) if new_head else set(), path)


def _of_checkpoint(path: Path) -> Tensors:
    """Of the checkpoint at `path`, or of the newest one of that run."""
    try:
        checkpoint = path if (path / "meta.json").is_file() else latest_checkpoint(path)
        if checkpoint is None:
            raise ValueError("there is no checkpoint in it")
        verify(checkpoint)
        found = checkpoint_tensors.read(checkpoint, MODEL, BITS)
    except ValueError as error:
        raise ValueError(f"no weights can be read from {path}: {error}; --init takes {ACCEPTED}") from error
    return {name.removeprefix(MODEL): tensor for name, tensor in found.items()}


def _of_safetensors(path: Path) -> Tensors:
    try:
        tensors: Tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"the weights {path} are not a safetensors file: {error}") from error
    for prefix in WRAPPERS * 2:  # of each other, in any order
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _names_of_head(config: ModelConfig) -> set[str]:
    """The tensors of a network whose shapes depend on the number of classes."""
    with torch.device("meta"):
        here, there = (
            model_signature(create_model(dataclasses.replace(config, num_classes=number, initial_weights="signs")))
            for number in (config.num_classes, config.num_classes + 1)
        )
    return {name for name, shape in here.items() if there[name] != shape}


def _load(model: nn.Module, tensors: Tensors, head: set[str], path: Path) -> None:
    state = model.state_dict()
    for name, shape in model_signature(model).items():
        bits, whole = BITS + name, tensors.get(name)
        if name in head:
            tensors.pop(bits, None)
            tensors[name] = state[name]
        elif whole is None and bits in tensors and tensors[bits].numel() == -(-math.prod(shape) // 8):
            tensors[name] = checkpoint_tensors.unpacked(tensors.pop(bits), shape)
        elif whole is None or list(whole.shape) != shape:
            found = "missing" if whole is None else list(whole.shape)
            hint = (
                "; to train a new classifier on other classes, pass --init_head new" if name.startswith("head") else ""
            )
            raise ValueError(f"the weights {path} do not fit: {name} is {found} there and {shape} in this model{hint}")
    if unknown := sorted(set(tensors) - set(state)):
        raise ValueError(f"the weights {path} do not fit: this model has no {unknown[0]}")
    model.load_state_dict(tensors)
