"""Validate on every image of the validation set exactly once, on any number of ranks."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.models import create_model
from bitfleet.trainer.checkpoint import is_checkpoint, latest_checkpoint, load_model, read_meta
from bitfleet.trainer.checkpoint.format import absolute
from bitfleet.trainer.config import TrainConfig, read_config
from bitfleet.trainer.data import (
    Dataset,
    TrainLoader,
    ValidationLoader,
    decoder_of,
    normalize,
    open_dataset,
    remembering,
)
from bitfleet.trainer.engine.arithmetic import remark_on_precision, use_arithmetic
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.config import Precision, resolve_precision
from bitfleet.trainer.engine.engine import autocast
from bitfleet.trainer.engine.nonfinite import broken
from bitfleet.trainer.metrics import Accuracy, AccuracyMeter
from bitfleet.trainer.ranks.check_same import check_same_on_all_ranks
from bitfleet.trainer.ranks.collectives import Ranks, all_reduce_number


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: ValidationLoader,
    config: TrainConfig,
    device: torch.device,
    must_stop: Callable[[], bool] = lambda: False,
) -> Accuracy | None:
    """Return loss and accuracy of `model` over the validation set; every rank calls this and gets
    the same result.

    Args:
        model: in any mode; it is left as it was.
        loader: this rank's images, on `device`.
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
            if config.engine.sharding == "zero3":  # all ranks gather the weights of each layer together
                predict(model, config, device, images.new_zeros((1, *images.shape[1:])))
            continue
        logits = predict(model, config, device, images)
        meter.add(nn.functional.cross_entropy(logits.float(), labels, reduction="none"), logits, labels)
    model.train(was_training)
    return None if stopped else meter.read()


def predict(model: nn.Module, config: TrainConfig, device: torch.device, images: Tensor) -> Tensor:
    """Return the logits of `images` as a loader gives them, in the precision of the run."""
    # Eager: the last batch is smaller, and every size would be compiled by itself.
    with autocast(device, config.engine.precision), torch.compiler.set_stance("force_eager"):
        logits: Tensor = model(normalize(images, config.data.mean, config.data.std))
    return logits


class Evaluation(NamedTuple):
    """Result of `evaluate_run`."""

    checkpoint: Path
    trained_in: str
    """Precision of the run."""
    accuracies: dict[Precision, Accuracy]
    num_different: int
    """Images whose first prediction is not the same in all of these precisions."""


def evaluate_run(
    path: Path,
    *,
    data_root: str | None,
    ranks: Ranks,
    device: torch.device,
    precisions: Sequence[Precision] = (),
    precise_bn_steps: int | None = None,
) -> Evaluation:
    """Validate a run's newest checkpoint, or the checkpoint at `path`; every rank calls this and
    gets the same.

    Args:
        path: run folder or checkpoint.
        data_root: where the data is now; None: where the run read it.
        ranks: this process's place.
        device: where the model runs.
        precisions: what to compute in, one validation each. None given: as the run did; fp32 on a
            CPU for a run in tf32.
        precise_bn_steps: optimizer steps whose images give the BatchNorm statistics; 0: the running
            averages. None: as the run did.

    Raises:
        ValueError: no run, no checkpoint, other classes than the run's, a precision that the device
            does not have, ranks that do not divide the replicas whose statistics are measured.
        FloatingPointError: weights or running statistics are not finite.
    """
    checkpoint = absolute(path) if is_checkpoint(path) else latest_checkpoint(path)
    config = read_config(checkpoint.parents[1] if checkpoint else path)
    if checkpoint is None:
        raise ValueError(f"the run {path} has no complete checkpoint to evaluate")
    config = _with_data(config, data_root, device)
    dataset = _open_data(config, checkpoint, ranks, was_named=data_root is not None)
    meta = read_meta(checkpoint)
    place = {"rank": ranks.rank, "world_size": ranks.world_size, "local_world_size": ranks.local_world_size}
    loader = ValidationLoader(dataset, config.data, device=device, **place)
    model = _load_network(config, checkpoint, device)
    num_steps = config.precise_bn_steps or 0 if precise_bn_steps is None else precise_bn_steps
    recent = images_before(meta, config, dataset, num_steps, ranks, device) if num_steps else []
    statistics = RunningStatistics(model, meta["num_replicas"])
    trained_in = config.engine.precision
    own = "fp32" if trained_in == "tf32" and device.type != "cuda" else resolve_precision(trained_in, device.type)
    accuracies: dict[Precision, Accuracy] = {}
    predictions: list[list[Tensor]] = []
    for precision in precisions or (own,):
        if ranks.is_main and (remark := remark_on_precision(precision, device.type)):
            print(f"bitfleet: {remark}", file=sys.stderr, flush=True)
        now = in_precision(config, precision)
        use_arithmetic(device, now.engine)
        measured = statistics.precise(model, recent, functools.partial(predict, model, now, device))
        with threads_of_run(meta), measured:
            predictions.append([])
            hook = model.register_forward_hook(lambda module, images, logits: predictions[-1].append(logits.argmax(1)))
            accuracy = validate(model, loader, now, device)
            hook.remove()
        assert accuracy is not None
        accuracies[precision] = accuracy
    found = [torch.cat(each).cpu() if each else torch.empty(0) for each in predictions]  # a rank may have no image
    different = sum(((other != found[0]) for other in found[1:]), torch.zeros(len(found[0]))) > 0
    return Evaluation(checkpoint, trained_in, accuracies, all_reduce_number(int(different.sum())))


def _with_data(config: TrainConfig, data_root: str | None, device: torch.device) -> TrainConfig:
    """Return `config` with the data as they are read here."""
    data = config.data if data_root is None else dataclasses.replace(config.data, root=data_root)
    if device.type != "cuda":  # a run that decoded on a GPU can be evaluated anywhere
        data = dataclasses.replace(data, device="auto")
    return dataclasses.replace(config, data=data)


def _open_data(config: TrainConfig, checkpoint: Path, ranks: Ranks, *, was_named: bool) -> Dataset:
    """Open the data of a run, unless they have other classes than those it was trained on."""
    root = config.data.root
    try:
        dataset = open_dataset(config.data)
    except ValueError as error:
        if was_named:
            raise
        raise ValueError(f"{error}; if the data has another path than in the run, pass it as --data_root") from error
    check_same_on_all_ranks(ranks, {f"the lists of images in {root} (sha256)": dataset.sha})
    classes, trained = list(dataset.classes), read_meta(checkpoint)["classes"]
    if classes != trained:
        raise ValueError(
            f"{root} has the classes {json.dumps(classes)[:200]}, the run was trained on {json.dumps(trained)[:200]}"
        )
    return dataset


def _load_network(config: TrainConfig, checkpoint: Path, device: torch.device) -> nn.Module:
    """Return the network of a checkpoint, unless values of it are not finite."""
    model = create_model(config.model).to(device)
    load_model(model, checkpoint)
    if names := broken([*model.named_parameters(), *model.named_buffers()]):
        raise FloatingPointError(
            f"the network of {checkpoint} predicts nothing: values of {', '.join(names[:3])} are not finite; "
            "evaluate an earlier checkpoint"
        )
    return model


def in_precision(config: TrainConfig, precision: Precision) -> TrainConfig:
    """Return `config` with a precision that need not be the run's."""
    # fp16 needs these for the gradients, of which there are none.
    engine = dataclasses.replace(config.engine, precision=precision, sharding="bits", on_nonfinite="skip")
    return dataclasses.replace(config, engine=engine)


@contextmanager
def threads_of_run(meta: Mapping[str, Any]) -> Iterator[None]:
    """Inside, torch has the CPU threads of the run whose checkpoint has `meta`: how BatchNorm sums
    a batch depends on them, and signs on the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(meta["num_threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def images_before(
    meta: Mapping[str, Any],
    config: TrainConfig,
    dataset: Dataset,
    num_steps: int,
    ranks: Ranks,
    device: torch.device,
) -> list[list[Tensor]]:
    """Read this rank's training images of the last `num_steps` steps before a checkpoint again.

    Args:
        meta: of the checkpoint.
        config: of its run.
        dataset: of the run.
        num_steps: their number; fewer if the checkpoint has made fewer.
        ranks: this process's place.
        device: where they are put.

    Returns:
        For each step its micro-batches, as a loader gives them. If the data set is not that of the
        run, rank 0 says so.

    Raises:
        ValueError: the ranks do not divide the replicas, or an image cannot be read.
    """
    if meta["num_replicas"] % ranks.world_size:
        raise ValueError(
            f"BatchNorm's statistics of {meta['num_replicas']} replicas are measured on a number of ranks that divides "
            f"it, not on {ranks.world_size}: start fewer, or pass --precise_bn_steps 0"
        )
    if ranks.is_main and dataset.sha != meta["data_sha"]:
        print(
            f"bitfleet: BatchNorm's statistics are measured on the training images of {config.data.root}, whose list "
            "of images is not that of the run: they may differ from the run's",
            file=sys.stderr,
            flush=True,
        )
    loader = TrainLoader(
        dataset,
        dataclasses.replace(config.data, loader=decoder_of(config.data)),  # a few do not need all in memory
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        num_replicas=meta["num_replicas"],
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        device=device,
    )
    num_micro_batches = meta["num_replicas"] // ranks.world_size
    return remembering(loader, meta["step"], num_steps, num_micro_batches).steps(num_micro_batches)
