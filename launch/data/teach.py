"""Write the logits of a run's teacher: `bitfleet data teach`."""

import functools
import shutil
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bitfleet.trainer.config import TrainConfig, resolve_replicas, with_precision
from bitfleet.trainer.data import Dataset, TrainLoader, normalize, open_dataset
from bitfleet.trainer.data.memory_pipeline import progress_bar
from bitfleet.trainer.distillation import Teacher, load_teacher
from bitfleet.trainer.distillation.cache import LogitCache, create, layout_for
from bitfleet.trainer.engine.arithmetic import use_arithmetic
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.run.versions import versions
from bitfleet.trainer.trainer import logits_identity


def teach(
    config: TrainConfig, first_epoch: int, last_epoch: int | None, ranks: Ranks, device: torch.device
) -> Iterator[str]:
    """Write the epochs of a run that its cache lacks; yield a line about the whole, then one per
    epoch.

    Args:
        config: of the run, with a teacher and a cache.
        first_epoch: counted from 0.
        last_epoch: the last one that is written; None for that of the run.
        ranks: of this process, which is alone.
        device: where the teacher runs.

    Raises:
        ValueError: bad input, a cache that was made for something else, or a disk that is full.
    """
    epochs = _epochs(config, first_epoch, last_epoch)
    if config.distill.cache is None:
        raise ValueError("bitfleet data teach needs the run's --distill.teacher, and a folder as --distill.cache")
    if ranks.world_size > 1:
        raise ValueError(
            f"bitfleet data teach runs on one rank, not {ranks.world_size}: start a command for each range of epochs"
        )
    use_arithmetic(device, with_precision(config, device.type).engine)
    dataset = open_dataset(config.data)
    size = config.global_batch_size // resolve_replicas(config, 1)
    loader = TrainLoader(
        dataset,
        config.data,
        seed=config.seed,
        global_batch_size=size,
        num_replicas=1,
        rank=0,
        world_size=1,
        local_world_size=1,
        device=device,
    )
    teacher = load_teacher(
        config.distill, num_classes=len(dataset.classes), image_size=config.data.image_size, device=device
    )
    cache = _cache(config, dataset, teacher, size)
    yield _announcement(cache, epochs)
    for epoch in epochs:
        start = time.monotonic()
        num_rows = cache.write_epoch(epoch, functools.partial(_logits, config, loader, teacher, epoch))
        seconds = time.monotonic() - start
        done = f"{num_rows:,} images in {seconds:,.1f} s ({num_rows / seconds:,.0f} images/s)"
        yield f"epoch {epoch}: {done if num_rows else 'is there'}"


def _epochs(config: TrainConfig, first: int, last: int | None) -> range:
    last = config.epochs - 1 if last is None else last
    if not 0 <= first <= last < config.epochs:
        raise ValueError(
            f"--first_epoch {first} and --last_epoch {last} must be epochs of the run, 0 to {config.epochs - 1}, in "
            "this order"
        )
    return range(first, last + 1)


def _cache(config: TrainConfig, dataset: Dataset, teacher: Teacher, micro_batch_size: int) -> LogitCache:
    """Open the cache, or start it."""
    assert config.distill.cache is not None
    identity = logits_identity(config, dataset, micro_batch_size, teacher.device, teacher.weights_sha256)
    layout = layout_for(len(dataset.train), len(dataset.classes), micro_batch_size)
    facts = {"versions": versions(), "num_threads": torch.get_num_threads()}
    return create(config.distill.cache, identity, layout, facts)


def _logits(config: TrainConfig, loader: TrainLoader, teacher: Teacher, epoch: int, row: int) -> Iterator[Tensor]:
    """Yield the logits of the micro-batches of an epoch, from `row` of it on."""
    micro_batch_size = config.global_batch_size // resolve_replicas(config, 1)
    first, num_batches = row // micro_batch_size, loader.steps_per_epoch
    with progress_bar(f"epoch {epoch}", (num_batches - first) * micro_batch_size) as bar:
        for images, _ in loader.batches(epoch * num_batches + first):
            yield teacher(normalize(images, config.data.mean, config.data.std))
            bar.update(micro_batch_size)


def _announcement(cache: LogitCache, epochs: range) -> str:
    """Describe what will be written.

    Raises:
        ValueError: the disk is too small.
    """
    missing = [epoch for epoch in epochs if not cache.has(epoch)]
    needed, free = len(missing) * cache.layout.bytes_per_epoch, shutil.disk_usage(cache.folder).free
    if needed > free:
        raise ValueError(
            f"the logits of {len(missing):,} epochs take {needed / 1e9:,.1f} GB, and the disk of {cache.folder} has "
            f"{free / 1e9:,.1f} GB free: write fewer (--last_epoch), or choose another --distill.cache"
        )
    return (
        f"{cache.folder}: {len(missing):,} of {len(epochs):,} epochs are missing, "
        f"{cache.layout.bytes_per_epoch / 1e6:,.1f} MB each; micro-batches of {cache.layout.micro_batch_size} images"
    )
