"""Weights to begin a run from: random ones, our own file, or one that Keras wrote."""

import math
import random
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from bitfleet.models import load_keras_weights
from bitfleet.models.keras_weights import Scales
from bitfleet.trainer import checkpoint_tensors
from bitfleet.trainer.checkpoint import model_signature


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch; every rank builds the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries use the global generator)
    torch.manual_seed(seed)


def load_initial_weights(model: nn.Module, path: Path, scales: Scales) -> None:
    """Fill `model` from a file of `bitfleet checkpoint weights` (.safetensors, packed or not) or of Keras (.npz, .h5).

    Args:
        model: on the CPU.
        path: the file.
        scales: how a Keras file has the scales of binary kernels.

    Raises:
        ValueError: the file is missing, of another kind, or does not fit; the tensor that differs is named.
    """
    if not path.is_file():
        raise ValueError(f"there is no file of initial weights at {path}")
    if path.suffix != ".safetensors":
        load_keras_weights(model, path, scales=scales)
        return
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"the weights {path} are not a safetensors file: {error}") from error
    for name, shape in model_signature(model).items():
        bits, whole = checkpoint_tensors.BITS + name, tensors.get(name)
        if whole is None and bits in tensors and tensors[bits].numel() == -(-math.prod(shape) // 8):
            tensors[name] = checkpoint_tensors.unpacked(tensors.pop(bits), shape)
        elif whole is None or list(whole.shape) != shape:
            found = "missing" if whole is None else list(whole.shape)
            raise ValueError(f"the weights {path} do not fit: {name} is {found} there and {shape} in this model")
    if unknown := sorted(set(tensors) - set(model.state_dict())):
        raise ValueError(f"the weights {path} do not fit: this model has no {unknown[0]}")
    model.load_state_dict(tensors)
