"""The checkpoints of a run: what they say of it, when they are due, and how it continues from one."""

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.diagnostics import BitDiagnostics
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.checkpoint import loader as checkpoint_loader
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import ENGINE, FOLDER, check_meta, check_model, latest_checkpoint, step_of
from bitfleet.trainer.checkpoint.loader import DIAGNOSTICS_SINCE, Intact
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.config import MACHINE, TrainConfig, from_dict, to_dict
from bitfleet.trainer.data import decoder_of
from bitfleet.trainer.engine.engine import load_engine, whole_weights
from bitfleet.trainer.metrics.metrics import read_metrics
from bitfleet.trainer.ranks.collectives import Ranks, sum_of_numbers
from bitfleet.trainer.run.folder import RunFolder, checkpoint_disk
from bitfleet.trainer.run.stop import AGREE_SECONDS
from bitfleet.trainer.run.versions import versions

ASSUMED_BYTES_PER_SECOND = 50e6
"""Of writing, hashing and flushing a checkpoint, before one has been measured: a slow disk."""
LAUNCHER_SECONDS = 30


class Parts(NamedTuple):
    """What is saved."""

    engine: Any
    model: nn.Module
    optimizer: Optimizer
    signature: dict[str, list[int]]
    """Of the model before the engine had it: zero3 takes the weights apart."""
    diagnostics: BitDiagnostics | None = None


def find_start(folder: RunFolder, ranks: Ranks) -> Intact | None:
    """The checkpoint that the run in `folder` continues from; every rank calls this.

    Raises:
        ValueError: none that would do is intact.
    """
    if folder.checkpoint is None:
        return None
    if folder.branches:
        return checkpoint_loader.load_given(folder.checkpoint, ranks)
    return checkpoint_loader.find_intact(folder.path, ranks)


def identity(
    config: TrainConfig, num_replicas: int, world_size: int, data_sha: str, *, compiled: bool
) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run: field -> value.

    DeepSpeed's own shards can only be read on as many ranks as wrote them; all else is free of the number of ranks. Of
    the loader only what decodes its images counts: data.loader "memory" continues a run of "dali".

    Args:
        config: the run; its precision is the one that it computes in, not "auto".
        num_replicas: micro-batches per step.
        world_size: number of ranks.
        data_sha: of the lists of images.
        compiled: whether the network is compiled, what "auto" in `model.compile` comes to.
    """
    resolved = to_dict(config)
    sections = {
        "data": {key: value for key, value in resolved["data"].items() if key not in MACHINE}
        | {"loader": decoder_of(config.data)},
        "engine": {
            key: resolved["engine"][key]
            for key in ("sharding", "precision", "deterministic", "grad_comm_dtype", "max_grad_norm")
        },
        "model": resolved["model"] | {"compile": "on" if compiled else "off"},
        "optim": resolved["optim"],
    }
    facts = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    if config.engine.stage > 0:
        facts["world_size"] = world_size
    fixed = {key: resolved[key] for key in ("epochs", "global_batch_size", "seed")}
    return {"num_replicas": num_replicas, "data_sha": data_sha} | fixed | facts


def _in_todays_fields(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """`meta` with the `identity` that its run would have now: fields that are younger than it have their defaults."""
    try:
        saved = from_dict(meta["config"])
    except ValueError:  # it has what is refused today: compared as it was written
        return meta
    today = identity(saved, meta["num_replicas"], meta["world_size"], meta["data_sha"], compiled=was_compiled(meta))
    # The decoder as it was then, on another machine.
    decoder = {"data.loader": meta["data.loader"]} if "data.loader" in meta else {}
    return {**meta, **today, **decoder}


def was_compiled(meta: Mapping[str, Any]) -> bool:
    """Whether the network of the run that wrote `meta` was compiled: none was before there was `model.compile`."""
    return bool(meta.get("model.compile") == "on")


class RunCheckpoints:
    """Saves and resumes one run.

    Args:
        config: the run.
        folder: where it is.
        ranks: this process's place.
        parts: what is saved.
        facts: `identity` of the run; stored, and compared when it is resumed.
        steps_per_epoch: global batches in an epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        ranks: Ranks,
        parts: Parts,
        facts: Mapping[str, Any],
        *,
        steps_per_epoch: int,
    ) -> None:
        self.config, self.folder, self.ranks, self.parts = config, folder, ranks, parts
        self.saver = Saver(folder.path, config.checkpoint, ranks, self._validation_top1)
        self._facts, self._steps_per_epoch = dict(facts), steps_per_epoch
        newest = None if folder.branches else latest_checkpoint(folder.path)
        self._last_step = step_of(newest) if newest else 0
        self._last_time = time.monotonic()
        self._earlier_seconds: float | None = None
        self._has_told_grace = False

    @property
    def _elastic(self) -> Optimizer | None:
        """The optimizer, unless its state is in DeepSpeed's own shards."""
        return self.parts.optimizer if self.config.engine.stage == 0 else None

    def resume(self, checkpoint: Intact) -> int:
        """Load `checkpoint`; returns its step.

        Raises:
            ValueError: it is of another run.
        """
        path, meta = checkpoint
        check_model(meta["model"], self.parts.signature, path)
        check_meta(_in_todays_fields(meta), self._facts, path)
        if self._elastic is None:
            load_engine(self.parts.engine, path, ENGINE)
        else:
            checkpoint_loader.load(self.parts.model, self._elastic, checkpoint)
            if self.parts.diagnostics is not None:
                checkpoint_loader.load_diagnostics(self.parts.diagnostics, checkpoint, self.ranks)
            self.parts.engine.lr_scheduler.load_state_dict({"num_steps_done": meta["step"]})
            self.parts.engine.global_steps = meta["step"]
        self._earlier_seconds = meta.get("save_seconds")
        self._last_step = meta["step"]
        return self._last_step

    def by_time(self) -> bool:
        """Whether the last checkpoint is older than wanted; rank 0's clock decides."""
        minutes = self.config.checkpoint.every_minutes
        return self.ranks.is_first and minutes is not None and time.monotonic() - self._last_time > 60 * minutes

    def by_step(self, step: int) -> bool:
        """Whether `step` is one after which to save."""
        config = self.config.checkpoint
        at_epoch = step % (config.every_epochs * self._steps_per_epoch) == 0
        return at_epoch or (config.every_steps is not None and step % config.every_steps == 0)

    def save(self, step: int, facts: Mapping[str, Any]) -> None:
        """Start to save the state after `step` optimizer steps, unless it has been saved; every rank calls this.

        Args:
            step: optimizer steps done.
            facts: further facts of the position, for meta.json.

        Raises:
            ValueError: this or the earlier save failed.
        """
        if step == self._last_step:
            return
        config, optimizer = self.config, self._elastic
        skipped = optimizer.num_skipped_steps if isinstance(optimizer, ShardedOptimizer) else 0
        transitions = optimizer.transition_state() if isinstance(optimizer, ShardedOptimizer) else None
        scale = optimizer.loss_scale if isinstance(optimizer, ShardedOptimizer) else None
        steps = optimizer.steps() if isinstance(optimizer, ShardedOptimizer | RoutedOptimizer) else {}
        meta = {
            "step": step,
            "epoch": step // self._steps_per_epoch,
            "sample_offset": step % self._steps_per_epoch * config.global_batch_size,
            "skipped_steps": skipped,
            "world_size": self.ranks.world_size,
            "save_seconds": self.saver.seconds or self._earlier_seconds,
            **self._facts,
            **facts,
            "schedules": {
                group: {key: schedule(step) for key, schedule in each.items()}
                for group, each in self.parts.engine.lr_scheduler.schedules.items()
            },
            "config": to_dict(config),
            "versions": versions(),
            "model": self.parts.signature,
            "optimizer_steps": steps,
            "transitions": transitions,
            "loss_scale": scale.state() if scale else None,
        }
        if self.parts.diagnostics is not None:
            meta[DIAGNOSTICS_SINCE] = self.parts.diagnostics.since
        with whole_weights(self.parts.engine):
            tensors = self._tensors()
            if optimizer is None:  # zero3 takes the weights apart again, before DeepSpeed writes its files
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.saver.save(step, tensors, meta, self._write_engine if optimizer is None else None)
        self._last_step, self._last_time = step, time.monotonic()

    def _tensors(self) -> checkpoint_tensors.Tensors:
        return checkpoint_tensors.tensors_to_save(self.parts.model, self._elastic, self.ranks, self.parts.diagnostics)

    def _flipped(self) -> set[str]:
        """Parameters that are +-1 from their first update on."""
        groups = (group for group in self.parts.optimizer.param_groups if RULES[group["rule"]].flips)
        return {name for group in groups for name in group["param_names"]}

    def _write_engine(self, folder: Path) -> None:
        self.parts.engine.save_checkpoint(str(folder), tag=ENGINE, save_latest=False)

    def _validation_top1(self) -> dict[int, float]:
        return {line["step"]: line["top1"] for line in read_metrics(self.folder.path) if line["kind"] == "validation"}

    def cost(self) -> str:
        """What checkpoints will take on disk, in words; every rank calls this."""
        with whole_weights(self.parts.engine):
            mine = checkpoint_tensors.total_bytes(self._tensors(), become_bits=self._flipped())
        if self._elastic is None:  # weights and moments once more, in DeepSpeed's files
            mine += 12 * sum(param.numel() for param in self.parts.model.parameters()) // self.ranks.world_size
        each = sum_of_numbers(mine)
        config = self.config.checkpoint
        kept = config.keep_last + config.keep_best + 1  # the new one is there before an old one goes
        text = f"checkpoints: {each / 1e6:,.1f} MB each, at most {kept} at a time ({kept * each / 1e6:,.1f} MB)"
        if config.keep_every_steps:
            text += f", and one every {config.keep_every_steps:,} steps for ever"
        free = shutil.disk_usage(checkpoint_disk(self.folder.path)).free
        text += f"; {free / 1e9:,.1f} GB free in {self.folder.path / FOLDER}"
        if self._earlier_seconds is not None:
            return f"{text}\n{grace(self._earlier_seconds, 'as measured before')}"
        return (
            f"{text}\n{grace(each / ASSUMED_BYTES_PER_SECOND, f'assumed at {ASSUMED_BYTES_PER_SECOND / 1e6:.0f} MB/s')}"
        )

    def new_grace(self, step_seconds: float) -> str:
        """What a stop needs, in words, once a save has been measured; "" before, and when it has been told."""
        if self.saver.seconds is None or self._has_told_grace:
            return ""
        self._has_told_grace = True
        return grace(self.saver.seconds, "measured", step_seconds)


def grace(save_seconds: float, how: str, step_seconds: float = 0.0) -> str:
    """What a stop needs, in words: the steps until the ranks agree on it, the save that is under way, and the one of the stop."""
    needed = math.ceil(max(step_seconds, AGREE_SECONDS) + 2 * save_seconds)
    text = f"a stop needs about {needed} s between SIGTERM and SIGKILL (a save takes {save_seconds:.1f} s, {how})"
    if needed > LAUNCHER_SECONDS:
        text += f": more than the {LAUNCHER_SECONDS} s that DeepSpeed's launcher gives; send SIGUSR1 in time instead"
    return text
