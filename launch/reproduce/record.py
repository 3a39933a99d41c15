"""What is known of a run, read from its folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfleet.launch.reproduce.verdict import Validation
from bitfleet.models import ModelSize, count, create_model
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import latest_checkpoint, step_of, verify
from bitfleet.trainer.checkpoint.tensors import BITS, MODEL, Tensors
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.metrics import JSONL, read_metrics
from bitfleet.trainer.run.folder import CONFIG, read_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A run, finished or not."""

    path: Path
    config: TrainConfig
    facts: dict[str, Any]
    """Of config.json: git, versions, hardware, world_size, num_replicas, device; those of its last part, if it was continued."""
    validations: tuple[Validation, ...]
    step: int
    """Last one that was logged."""
    num_steps: int
    """Of the whole run."""
    steps_per_epoch: int
    hours: float
    """Of the training steps; validation and starting are not in it."""
    num_skipped_steps: int
    checkpoint_step: int
    data_sha: str
    """sha256 over the lists of images."""
    weights_sha: str
    """sha256 over the model's tensors at `checkpoint_step`."""
    size: ModelSize

    @property
    def num_bytes(self) -> int:
        """Of the network: a bit for each binary weight, 4 bytes for any other parameter and running statistic."""
        others = self.size.num_parameters - self.size.num_binary_parameters + self.size.num_running_statistics
        return -(-self.size.num_binary_parameters // 8) + 4 * others


def read_record(run: Path) -> Record:
    """Read the folder of a run; its newest checkpoint is verified.

    Raises:
        ValueError: there is no run, it has logged nothing or saved nothing yet, or its checkpoint is damaged.
    """
    config = read_config(run)
    facts: dict[str, Any] = json.loads((run / CONFIG).read_text())
    lines = read_metrics(run)
    trained = [line for line in lines if line["kind"] == "train"]
    checkpoint = latest_checkpoint(run)
    if not trained or checkpoint is None:
        missing = f"no training step in {JSONL}" if not trained else "no complete checkpoint"
        raise ValueError(
            f"there is nothing to judge in {run} yet: it has {missing}; `bitfleet reproduce NAME` continues it"
        )
    steps_per_epoch = round(trained[-1]["step"] / trained[-1]["epoch"])
    meta = verify(checkpoint)
    tensors = checkpoint_tensors.read(checkpoint, MODEL, BITS)
    del facts["config"]
    return Record(
        path=run,
        config=config,
        facts=facts,
        validations=tuple(
            Validation(line["step"], 100 * line["top1"], 100 * line["top5"], line["num_images"])
            for line in lines
            if line["kind"] == "validation"
        ),
        step=trained[-1]["step"],
        num_steps=config.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        hours=sum(line["seconds"] for line in trained) / 3600,
        num_skipped_steps=meta["skipped_steps"],
        checkpoint_step=step_of(checkpoint),
        data_sha=meta["data_sha"],
        weights_sha=weights_sha(checkpoint_tensors.model_state(tensors, meta["model"])),
        size=_size(config),
    )


def weights_sha(state: Tensors) -> str:
    """sha256 over name, type, shape and bytes of each tensor, by name: the same on any number of ranks.

    Args:
        state: name -> tensor, as `model.state_dict()`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _size(config: TrainConfig) -> ModelSize:
    with torch.device("meta"):
        model = create_model(config.model)
    return count(model, (3, config.data.image_size, config.data.image_size))
