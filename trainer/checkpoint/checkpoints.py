"""The checkpoints of a run: when to save, the content of meta.json, and how to resume."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from torch import nn
from torch.optim import Optimizer

from bitfleet.models import ModelConfig
from bitfleet.optim import OptimConfig, RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.diagnostics import BitDiagnostics
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.checkpoint.format import ENGINE, FOLDER, check_meta, check_model, latest_checkpoint, step_of
from bitfleet.trainer.checkpoint.loader import DIAGNOSTICS_SINCE, ValidCheckpoint, load, load_diagnostics
from bitfleet.trainer.checkpoint.run_folder import RunFolder, checkpoint_disk
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.data import DataConfig, decoder_of
from bitfleet.trainer.distillation import DistillConfig
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.engine.engine import load_engine, whole_weights
from bitfleet.trainer.metrics import read_metrics
from bitfleet.trainer.ranks.collectives import Ranks, all_reduce_number
from bitfleet.trainer.run.roles import fields_with_role
from bitfleet.trainer.run.stop import AGREE_SECONDS

ASSUMED_BYTES_PER_SECOND = 50e6
"""Speed of writing, hashing and flushing, until one is measured: that of a slow disk."""
SECTIONS: dict[str, TypeAdapter[Any]] = {
    "data": TypeAdapter(DataConfig),
    "distill": TypeAdapter(DistillConfig),
    "engine": TypeAdapter(EngineConfig),
    "model": TypeAdapter(ModelConfig),
    "optim": TypeAdapter(OptimConfig),
}
"""Sections of a configuration that a resumed run must keep."""
DISTILL_FIELDS = ("teacher", "temperature", "label_weight")
ENGINE_FIELDS = ("sharding", "precision", "deterministic", "grad_comm_dtype", "max_grad_norm")
LAUNCHER_SECONDS = 30
"""Time between SIGTERM and SIGKILL by DeepSpeed's launcher."""


class TrainState(NamedTuple):
    """The objects whose state is saved."""

    engine: Any
    model: nn.Module
    optimizer: Optimizer
    signature: dict[str, list[int]]
    """Shapes of the model before the engine got it: zero3 partitions the weights."""
    diagnostics: BitDiagnostics | None = None

    @property
    def own_optimizer(self) -> Optimizer | None:
        """The optimizer, or None under ZeRO, whose state DeepSpeed saves in its own files."""
        return self.optimizer if self.engine.zero_optimization_stage() == 0 else None


def identity(
    config: Mapping[str, Any],
    num_replicas: int,
    world_size: int,
    data_sha: str,
    *,
    compiled: bool,
    teacher_sha: str = "",
) -> dict[str, Any]:
    """Return what must be equal for a resumed run to be the same run: field -> value.

    DeepSpeed's own shards can only be read by as many ranks as wrote them; anything else is
    independent of the number of ranks. Of the loader only the decoder counts: data.loader "memory"
    can resume "dali".

    Args:
        config: configuration of the run as JSON types, with its resolved precision. Fields that are
            missing, because the configuration is older than they are, get their defaults.
        num_replicas: micro-batches per step.
        world_size: number of ranks.
        data_sha: sha256 of the lists of images.
        compiled: True if the network is compiled, whether by "on" or by "auto".
        teacher_sha: sha256 of the weights of the teacher; "" without one.

    Raises:
        ValueError: the configuration is no longer accepted.
    """
    sections, parts = {}, {}
    with_newer_sections: Mapping[str, Any] = {"distill": {}, **config}
    for section, adapter in SECTIONS.items():
        parts[section] = adapter.validate_python(with_newer_sections[section])
        sections[section] = json.loads(adapter.dump_json(parts[section]))
    data, engine = sections["data"], sections["engine"]
    # Validation trains nothing, and a resumed run may have less memory for it.
    changeable = fields_with_role(DataConfig, "host", "machine") | {"val_batch_size"}
    sections["data"] = {key: value for key, value in data.items() if key not in changeable}
    sections["data"]["loader"] = decoder_of(parts["data"])
    sections["engine"] = {key: engine[key] for key in ENGINE_FIELDS}
    sections["distill"] = {key: sections["distill"][key] for key in DISTILL_FIELDS}
    sections["model"]["compile"] = "on" if compiled else "off"
    fields = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    if engine["sharding"].startswith("zero"):
        fields["world_size"] = world_size
    run = {key: config[key] for key in ("epochs", "global_batch_size", "seed")}
    return {"num_replicas": num_replicas, "data_sha": data_sha} | run | fields | {"teacher_sha": teacher_sha}


def _with_todays_identity(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `meta` with today's `identity` of its run: newer fields get their defaults."""
    try:
        today = identity(
            meta["config"],
            meta["num_replicas"],
            meta["world_size"],
            meta["data_sha"],
            compiled=was_compiled(meta),
            teacher_sha=meta.get("teacher_sha", ""),
        )
    except ValueError:  # its configuration is no longer accepted: compare it as it was written
        return meta
    # The decoder of the machine that wrote it.
    decoder = {"data.loader": meta["data.loader"]} if "data.loader" in meta else {}
    return {**meta, **today, **decoder}


def was_compiled(meta: Mapping[str, Any]) -> bool:
    """Return True if the run that wrote `meta` compiled its network; very old ones did not."""
    return bool(meta.get("model.compile") == "on")


class Checkpoints:
    """Save and resume one run.

    Args:
        config: when to save, and what to keep.
        folder: of the run.
        ranks: rank and world size.
        state: what is saved.
        identity: of the run; stored, and compared when it is resumed.
        constants: the rest of meta.json that is the same in every checkpoint.
        steps_per_epoch: global batches per epoch.
        global_batch_size: images per step.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: RunFolder,
        ranks: Ranks,
        state: TrainState,
        *,
        identity: Mapping[str, Any],
        constants: Mapping[str, Any],
        steps_per_epoch: int,
        global_batch_size: int,
    ) -> None:
        self.config, self.folder, self.ranks, self.state = config, folder, ranks, state
        self.saver = Saver(folder.path, config, ranks, self._validation_top1)
        self._identity, self._constants = dict(identity), dict(constants)
        self._steps_per_epoch, self._global_batch_size = steps_per_epoch, global_batch_size
        newest = None if folder.branches else latest_checkpoint(folder.path)
        self._last_step = step_of(newest) if newest else 0
        self._last_time = time.monotonic()
        self._earlier_seconds: float | None = None
        self._has_told_shutdown = False

    def resume(self, checkpoint: ValidCheckpoint) -> int:
        """Load `checkpoint` and return its step.

        Raises:
            ValueError: it belongs to another run.
        """
        path, meta = checkpoint
        check_model(meta["model"], self.state.signature, path)
        check_meta(_with_todays_identity(meta), self._identity, path)
        if self.state.own_optimizer is None:
            load_engine(self.state.engine, path, ENGINE)
        else:
            load(self.state.model, self.state.optimizer, checkpoint)
            if self.state.diagnostics is not None:
                load_diagnostics(self.state.diagnostics, checkpoint, self.ranks)
            self.state.engine.lr_scheduler.load_state_dict({"num_steps_done": meta["step"]})
            self.state.engine.global_steps = meta["step"]
        self._earlier_seconds = meta.get("save_seconds")
        step: int = meta["step"]
        if not self.folder.branches:  # else it is in the folder of another run
            self._last_step = step
        return step

    def by_time(self) -> bool:
        """Return True if the last checkpoint is older than `every_minutes` on rank 0."""
        minutes = self.config.every_minutes
        return self.ranks.is_main and minutes is not None and time.monotonic() - self._last_time > 60 * minutes

    def by_step(self, step: int) -> bool:
        """Return True if a checkpoint is due after `step` steps."""
        config = self.config
        at_epoch = step % (config.every_epochs * self._steps_per_epoch) == 0
        return at_epoch or (config.every_steps is not None and step % config.every_steps == 0)

    def save(self, step: int, **progress: Any) -> None:
        """Start to save the state after `step` steps, unless it is saved; every rank calls this.

        Args:
            step: optimizer steps done.
            progress: more entries of meta.json: what changed since the last checkpoint.

        Raises:
            ValueError: this save or the previous one failed.
        """
        if step == self._last_step:
            return
        meta = self._meta(step) | progress
        own = self.state.own_optimizer is not None
        with whole_weights(self.state.engine):
            tensors = self._tensors()
            if not own:  # zero3 partitions the weights again before DeepSpeed writes its files
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.saver.save(step, tensors, meta, None if own else self._write_engine)
        self._last_step, self._last_time = step, time.monotonic()

    def _meta(self, step: int) -> dict[str, Any]:
        diagnostics = self.state.diagnostics
        return {
            "step": step,
            "epoch": step // self._steps_per_epoch,
            "sample_offset": step % self._steps_per_epoch * self._global_batch_size,
            "world_size": self.ranks.world_size,
            "save_seconds": self.saver.seconds or self._earlier_seconds,
            **self._identity,
            **self._constants,
            "schedules": {
                group: {key: schedule(step) for key, schedule in schedules.items()}
                for group, schedules in self.state.engine.lr_scheduler.schedules.items()
            },
            "model": self.state.signature,
            **_optimizer_meta(self.state.own_optimizer),
            **({} if diagnostics is None else {DIAGNOSTICS_SINCE: diagnostics.since}),
        }

    def _tensors(self) -> checkpoint_tensors.Tensors:
        state = self.state
        return checkpoint_tensors.tensors_to_save(state.model, state.own_optimizer, self.ranks, state.diagnostics)

    def _write_engine(self, folder: Path) -> None:
        self.state.engine.save_checkpoint(str(folder), tag=ENGINE, save_latest=False)

    def _validation_top1(self) -> dict[int, float]:
        return {line["step"]: line["top1"] for line in read_metrics(self.folder.path) if line["kind"] == "validation"}

    def cost(self) -> str:
        """Describe the disk space that checkpoints will take; every rank calls this."""
        groups = (group for group in self.state.optimizer.param_groups if RULES[group["rule"]].flips)
        become_bits = {name for group in groups for name in group["param_names"]}
        with whole_weights(self.state.engine):
            num_bytes = checkpoint_tensors.total_bytes(self._tensors(), become_bits)
        if self.state.own_optimizer is None:  # DeepSpeed's files hold weights and moments once more
            num_elements = sum(param.numel() for param in self.state.model.parameters())
            num_bytes += 12 * num_elements // self.ranks.world_size
        size = all_reduce_number(num_bytes)
        config = self.config
        kept = config.keep_last + config.keep_best + 1  # before pruning there is one more
        text = f"checkpoints: {size / 1e6:,.1f} MB each, at most {kept} at a time ({kept * size / 1e6:,.1f} MB)"
        if config.keep_every_steps:
            text += f", and one every {config.keep_every_steps:,} steps that is never deleted"
        free = shutil.disk_usage(checkpoint_disk(self.folder.path)).free
        text += f"; {free / 1e9:,.1f} GB free in {self.folder.path / FOLDER}\n"
        if self._earlier_seconds is not None:
            return text + _shutdown(self._earlier_seconds, "measured earlier")
        assumed = f"assumed at {ASSUMED_BYTES_PER_SECOND / 1e6:.0f} MB/s"
        return text + _shutdown(size / ASSUMED_BYTES_PER_SECOND, assumed)

    def shutdown_message(self, step_seconds: float) -> str:
        """Say once, after the first measured save, how long a stop takes; "" otherwise."""
        if self.saver.seconds is None or self._has_told_shutdown:
            return ""
        self._has_told_shutdown = True
        return _shutdown(self.saver.seconds, "measured", step_seconds)


def _optimizer_meta(optimizer: Optimizer | None) -> dict[str, Any]:
    """Return the state of an optimizer that is not tensors; None if DeepSpeed saves it."""
    meta = {"skipped_steps": 0, "optimizer_steps": {}, "transitions": None, "loss_scale": None}
    if isinstance(optimizer, ShardedOptimizer | RoutedOptimizer):
        meta["optimizer_steps"] = optimizer.steps()
    if isinstance(optimizer, ShardedOptimizer):
        scale = optimizer.loss_scale
        meta["skipped_steps"], meta["transitions"] = optimizer.num_skipped_steps, optimizer.transition_state()
        meta["loss_scale"] = scale.state() if scale else None
    return meta


def _shutdown(save_seconds: float, source: str, step_seconds: float = 0.0) -> str:
    """Say how long a stop takes: the ranks agree, a save in progress ends, the last one is made."""
    needed = math.ceil(max(step_seconds, AGREE_SECONDS) + 2 * save_seconds)
    text = f"a stop needs about {needed} s between SIGTERM and SIGKILL (a save takes {save_seconds:.1f} s, {source})"
    if needed > LAUNCHER_SECONDS:
        text += f": more than the {LAUNCHER_SECONDS} s that DeepSpeed's launcher gives; send SIGUSR1 early instead"
    return text
