"""Validation: every image of the validation set exactly once, on any number of ranks."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bitfleet.models import create_model
from bitfleet.trainer.agreement import agree
from bitfleet.trainer.checkpoint import is_checkpoint, latest_checkpoint, read_meta
from bitfleet.trainer.checkpoint_loader import load_model
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import ValidationLoader, normalize, open_dataset
from bitfleet.trainer.distributed import Ranks
from bitfleet.trainer.engine import autocast
from bitfleet.trainer.metrics import Accuracy, AccuracyMeter
from bitfleet.trainer.run_folder import read_config


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: ValidationLoader,
    config: TrainConfig,
    device: torch.device,
    must_stop: Callable[[], bool] = lambda: False,
) -> Accuracy | None:
    """Loss and accuracy of `model` over the validation set; every rank calls this and gets the same result.

    Args:
        model: in any mode; it is left as it was.
        loader: this rank's images.
        config: of the run.
        device: where the model runs.
        must_stop: asked before each batch; the same on every rank.

    Returns:
        The means, the same bits on any number of ranks; None if it had to stop.
    """
    was_training = model.training
    model.eval()
    meter = AccuracyMeter(device)
    stopped = False
    for images, labels in loader:
        if stopped := must_stop():
            break
        if labels.numel() == 0:  # the other ranks have the rest
            continue
        # Eager: the last batch is smaller, and every size would be compiled by itself.
        with autocast(device, config.engine.precision), torch.compiler.set_stance("force_eager"):
            logits = model(normalize(images.to(device), config.data.mean, config.data.std))
        labels = labels.to(device)
        meter.add(nn.functional.cross_entropy(logits.float(), labels, reduction="none"), logits, labels)
    model.train(was_training)
    return None if stopped else meter.read()


def evaluate_run(path: Path, *, data_root: str | None, ranks: Ranks, device: torch.device) -> tuple[Path, Accuracy]:
    """Validate a run's newest checkpoint, or the checkpoint at `path`.

    Args:
        path: run folder or checkpoint.
        data_root: where the data is now; None: where the run read it.
        ranks: this process's place.
        device: where the model runs.

    Returns:
        The checkpoint and its accuracy.

    Raises:
        ValueError: no run, no checkpoint, other classes than the run's.
    """
    checkpoint = path.resolve() if is_checkpoint(path) else latest_checkpoint(path)
    config = read_config(checkpoint.parents[1] if checkpoint else path)
    if checkpoint is None:
        raise ValueError(f"the run {path} has no complete checkpoint to evaluate")
    data = config.data if data_root is None else dataclasses.replace(config.data, root=data_root)
    config = dataclasses.replace(config, data=data)
    dataset = open_dataset(data)
    agree(ranks, {f"the lists of images in {data.root} (sha256)": dataset.sha})
    classes = read_meta(checkpoint)["classes"]
    if list(dataset.classes) != classes:
        raise ValueError(
            f"{data.root} has the classes {json.dumps(dataset.classes)[:200]}, the run was trained on {json.dumps(classes)[:200]}"
        )
    loader = ValidationLoader(
        dataset, data, rank=ranks.rank, world_size=ranks.world_size, local_world_size=ranks.local_world_size
    )
    model = create_model(config.model).to(device)
    load_model(model, checkpoint)
    accuracy = validate(model, loader, config, device)
    assert accuracy is not None
    return checkpoint, accuracy
