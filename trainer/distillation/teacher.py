"""Load the teacher, and call it."""

import difflib
import hashlib
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from bitfleet.trainer.distillation.config import DistillConfig
from bitfleet.trainer.run.out_of_memory import is_out_of_memory

ACCEPTED = "a .safetensors file, as `bitfleet checkpoint weights` and safetensors.torch.save_file write it"


class Teacher:
    """A frozen network in eval mode.

    Args:
        network: on `device`.
        weights_sha256: of its weights, see `file_sha256` and `tensors_sha256`.
        device: of the network and of its inputs.
    """

    def __init__(self, network: nn.Module, weights_sha256: str, device: torch.device) -> None:
        self.network = network.requires_grad_(False).eval()
        self.weights_sha256 = weights_sha256
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits, float16 [N, classes], of normalized images, float32 [N, 3, H, W]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits: Tensor = self.network(images)
        return logits.to(torch.float16)


def precision_on(device: torch.device) -> str:
    """Return the precision that a teacher computes in."""
    return "bf16" if device.type == "cuda" else "fp32"


def load_teacher(config: DistillConfig, *, num_classes: int, image_size: int, device: torch.device) -> Teacher:
    """Build the teacher, load its weights and try it on an image.

    Raises:
        ValueError: there is no such network or file, the weights do not fit, or the network has
            another number of classes or does not take the images.
    """
    _check_name(config.teacher)
    if config.weights is None:
        network = _from_hub(config.teacher)
        _check_num_classes(config, getattr(network, "num_classes", num_classes), num_classes)
        sha256 = tensors_sha256(network.state_dict())
    else:
        network, sha256 = _from_file(config, config.weights, num_classes), file_sha256(config.weights)
    teacher = Teacher(network.to(device), sha256, device)
    _try(teacher, config, num_classes, image_size)
    return teacher


def create_teacher(name: str, num_classes: int) -> nn.Module:
    """Build a teacher with random weights.

    Raises:
        ValueError: there is no such network.
    """
    _check_name(name)
    network: nn.Module = timm.create_model(name, num_classes=num_classes)
    return network


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models()) or ["resnet34"]
        raise ValueError(f"there is no network {name!r} (distill.teacher); did you mean one of {', '.join(near)}?")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file of weights.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(
            f"the weights of the teacher {path} (distill.weights) cannot be read ({error.strerror}): pass {ACCEPTED}"
        ) from error


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_hub(name: str) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # of many types: the hub's, the network's, timm's own
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"timm gets no weights for the teacher {name} ({reason}): download them where there is a network, or pass "
            f"--distill.weights with {ACCEPTED}"
        ) from error
    return network


def _from_file(config: DistillConfig, path: Path, num_classes: int) -> nn.Module:
    file_sha256(path)  # one sentence about a file that is not there
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"the weights of the teacher {path} (distill.weights) are not a safetensors file ({error}): pass {ACCEPTED}"
        ) from error
    network = create_teacher(config.teacher, num_classes)
    state = network.state_dict()
    head = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    for name, tensor in state.items():
        loaded = tensors.get(name)
        if loaded is not None and loaded.shape == tensor.shape:
            continue
        if loaded is not None and isinstance(head, str) and name.startswith(f"{head}."):
            _check_num_classes(config, len(loaded), num_classes)
        there = "missing" if loaded is None else list(loaded.shape)
        raise ValueError(
            f"the weights {path} do not fit the teacher {config.teacher}: {name} is {there} there and "
            f"{list(tensor.shape)} in the network with {num_classes} classes; pass the network that they belong to"
        )
    if unknown := sorted(set(tensors) - set(state)):
        raise ValueError(
            f"the weights {path} do not fit the teacher {config.teacher}, which has no {unknown[0]}: pass the network "
            "that they belong to"
        )
    network.load_state_dict(tensors)
    return network


def _check_num_classes(config: DistillConfig, found: int, num_classes: int) -> None:
    if found != num_classes:
        raise ValueError(
            f"the teacher {config.teacher} tells {found:,} classes apart, and the run has {num_classes:,}: pass a "
            "teacher that was trained on the classes of the run, with --distill.weights"
        )


def _try(teacher: Teacher, config: DistillConfig, num_classes: int, image_size: int) -> None:
    """Call the teacher for one black image."""
    try:
        logits = teacher(torch.zeros(1, 3, image_size, image_size, device=teacher.device))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the teacher {config.teacher} cannot take images of {image_size}x{image_size} pixels ({reason}): choose "
            "another teacher or data.image_size"
        ) from error
    _check_num_classes(config, logits.shape[-1], num_classes)
