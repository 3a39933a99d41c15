"""The training loop."""

import random
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfleet.models import create_model
from bitfleet.optim import ShardedOptimizer, build_optimizer, routing_table
from bitfleet.trainer import checkpoint as checkpoints
from bitfleet.trainer.config import TrainConfig, resolve_replicas, to_dict
from bitfleet.trainer.data import TrainLoader, ValidationLoader, normalize, open_dataset
from bitfleet.trainer.distributed import Ranks, from_first_rank
from bitfleet.trainer.engine import backward, create_engine, deepspeed_options, shard, whole_weights
from bitfleet.trainer.evaluate import validate
from bitfleet.trainer.metrics import Accuracy, AccuracyMeter, FlipCounter, MetricsWriter, Stopwatch
from bitfleet.trainer.progress import Progress
from bitfleet.trainer.run_folder import RunFolder, choose_run_folder, write_config
from bitfleet.trainer.running_statistics import RunningStatistics


class Trainer:
    """Builds everything that a run needs; `train()` runs it.

    Args:
        config: the run.
        ranks: this process's place; the process group exists.
        device: where the model runs.

    Raises:
        ValueError: anything about configuration, data, run folder or checkpoint that does not fit.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        self.num_replicas = resolve_replicas(config, ranks.world_size)
        options = deepspeed_options(
            config.engine,
            global_batch_size=config.global_batch_size,
            num_replicas=self.num_replicas,
            world_size=ranks.world_size,
        )
        self.folder: RunFolder = from_first_rank(choose_run_folder(config) if ranks.is_first else None)  # type: ignore[assignment]
        self.dataset = open_dataset(config.data)
        if len(self.dataset.classes) != config.model.num_classes:
            raise ValueError(
                f"model.num_classes is {config.model.num_classes}, but {config.data.root} has {len(self.dataset.classes)} "
                f"classes: pass --model.num_classes {len(self.dataset.classes)}"
            )
        place = {"rank": ranks.rank, "world_size": ranks.world_size, "local_world_size": ranks.local_world_size}
        self.loader = TrainLoader(
            self.dataset,
            config.data,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            num_replicas=self.num_replicas,
            **place,
        )
        self.validation_loader = ValidationLoader(self.dataset, config.data, **place)
        self.num_steps = config.epochs * self.loader.steps_per_epoch

        seed_everything(config.seed)
        self.model = create_model(config.model).to(device)
        # As the paper's code: decay_steps = epochs * images // batch, a little longer than the run of whole batches.
        decay_steps = config.epochs * len(self.dataset.train) // config.global_batch_size
        self.optimizer, schedules = build_optimizer(self.model, config.optim, num_steps=decay_steps)
        self.routing, self.signature = routing_table(self.optimizer), checkpoints.model_signature(self.model)
        self.sharded = shard(self.optimizer, config.engine, self.num_replicas)
        self.engine = create_engine(self.model, self.sharded, schedules, options, device)
        self.statistics = RunningStatistics(self.model, self.num_replicas)
        self.step = self._resume() if self.folder.checkpoint else 0
        self._skipped_before: tuple[int, int] = (0, self.step)
        self.meter, self.flips, self.stopwatch = AccuracyMeter(device), FlipCounter(self.model), Stopwatch()

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run: field -> value."""
        config = to_dict(self.config)
        data = {
            key: value
            for key, value in config["data"].items()
            if key not in ("root", "device", "num_threads", "val_batch_size")
        }
        engine = {key: config["engine"][key] for key in ("sharding", "precision", "grad_comm_dtype", "max_grad_norm")}
        sections = {"data": data, "engine": engine, "model": config["model"], "optim": config["optim"]}
        return {
            "world_size": self.ranks.world_size,
            "num_replicas": self.num_replicas,
            "data_sha": self.dataset.sha,
            **{key: config[key] for key in ("epochs", "global_batch_size", "seed")},
            **{f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()},
        }

    def _resume(self) -> int:
        path = self.folder.checkpoint
        assert path is not None
        meta = checkpoints.read_meta(path)
        checkpoints.check_model(meta["model"], self.signature, path)
        checkpoints.check_meta(meta, self._identity(), path)
        checkpoints.load(self.engine, self.model, self.sharded, path, self.ranks)
        return int(meta["step"])

    def save(self) -> None:
        """Commit a checkpoint of the current step; every rank calls this."""
        steps_per_epoch = self.loader.steps_per_epoch
        meta = self._identity() | {
            "epoch": self.step // steps_per_epoch,
            "sample_offset": self.step % steps_per_epoch * self.config.global_batch_size,
            "classes": list(self.dataset.classes),
            "config": to_dict(self.config),
        }
        checkpoints.save(
            self.engine,
            self.model,
            self.sharded,
            self.folder.path,
            self.step,
            meta,
            ranks=self.ranks,
            keep_last=self.config.checkpoint.keep_last,
        )

    def validate(self) -> Accuracy:
        """Accuracy of the current weights over the validation set."""
        return validate(self.model, self.validation_loader, self.config, self.device)

    def train_step(self) -> None:
        """One optimizer step over this rank's micro-batches."""
        for _ in range(self.num_replicas // self.ranks.world_size):
            start = time.perf_counter()
            images, labels = next(self.batches)
            self.stopwatch.waited(time.perf_counter() - start)
            labels = labels.to(self.device, non_blocking=True)
            images = normalize(images.to(self.device, non_blocking=True), self.config.data.mean, self.config.data.std)
            self.statistics.start_replica()
            logits: Tensor = self.engine(images)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            backward(self.engine, loss, self.config.engine.sharding)
            self.statistics.end_replica()
            self.meter.add(loss, logits.detach(), labels)
            self.engine.step()
        self.statistics.end_step()
        self.step += 1

    def start(self) -> None:
        """Open the run folder, the progress bar and the stream of batches at the current step."""
        self.log = self._open_log()
        self.progress = Progress(
            start_step=self.step,
            num_steps=self.num_steps,
            steps_per_epoch=self.loader.steps_per_epoch,
            visible=self.ranks.is_first,
        )
        self.batches = self.loader.batches(self.step)
        self.engine.train()
        self.stopwatch.read()

    def advance(self, *, logging: bool) -> None:
        """One step; with `logging` also the host syncs and the writing of a logging step."""
        if not logging:
            self.train_step()
            return
        with whole_weights(self.engine):
            if self.log:
                self.flips.before_step()
        hyperparameters = self._hyperparameters()
        self.train_step()
        self._report(hyperparameters)

    def train(self) -> None:
        """Run from the current step to the end, or to `stop_after_steps`."""
        config, per_epoch = self.config, self.loader.steps_per_epoch
        last = min(self.num_steps, config.stop_after_steps or self.num_steps)
        self.start()
        while self.step < last:
            self.advance(logging=(self.step + 1) % config.metrics.every_steps == 0 or self.step + 1 == last)
            epoch, rest = divmod(self.step, per_epoch)
            if rest == 0 and (epoch % config.validate_every_epochs == 0 or self.step == self.num_steps):
                self._validate_and_report(epoch)
            if self._save_is_due(last):
                self.save()
            if rest == 0:
                self.stopwatch.read()  # images/s are those of the steps
        self.stop()

    def stop(self) -> None:
        """Close what `start` opened."""
        self.progress.close()
        if self.log:
            self.log.close()

    def _save_is_due(self, last: int) -> bool:
        config, per_epoch = self.config.checkpoint, self.loader.steps_per_epoch
        at_epoch = self.step % (config.every_epochs * per_epoch) == 0
        return at_epoch or self.step == last or (config.every_steps is not None and self.step % config.every_steps == 0)

    def _open_log(self) -> MetricsWriter | None:
        if not self.ranks.is_first:
            return None
        facts = {"world_size": self.ranks.world_size, "num_replicas": self.num_replicas, "device": str(self.device)}
        write_config(self.folder.path, self.config, facts)
        log = MetricsWriter(self.folder.path, self.step)
        log.write_text("config", (self.folder.path / "config.json").read_text())
        log.write_text("routing", self.routing)
        return log

    def _hyperparameters(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            values |= {key: group[key] for key in ("gamma", "sigma", "threshold", "lr") if key in group}
        return values

    def _report(self, hyperparameters: dict[str, float]) -> None:
        with whole_weights(self.engine):
            flips = self.flips.after_step() if self.log else {}
        train = self.meter.read()
        seconds, data_seconds = self.stopwatch.read()
        if not np.isfinite(train.loss):
            raise FloatingPointError(f"the training loss is {train.loss} at step {self.step}: lower the learning rate")
        skipped = self._count_skipped()
        if self.log is None:
            return
        speed = train.num_images / seconds
        values = {
            "loss": train.loss,
            "top1": train.top1,
            "top5": train.top5,
            "epoch": self.step / self.loader.steps_per_epoch,
        }
        values |= (
            hyperparameters
            | {"images_per_second": speed, "data_wait_seconds": data_seconds, "seconds": seconds}
            | flips
            | {"skipped_steps": skipped}
        )
        self.log.write("train", self.step, values)
        self.progress.update(
            self.step, loss=train.loss, top1=train.top1, images_per_second=speed, flip_ratio=flips.get("flip_ratio")
        )

    def _count_skipped(self) -> int:
        """Steps that were skipped because a gradient was not finite.

        Raises:
            FloatingPointError: all of them since the last logging step.
        """
        if not isinstance(self.sharded, ShardedOptimizer):
            return 0
        skipped: int = self.sharded.num_skipped_steps
        steps: int = self.sharded.num_steps
        if skipped - self._skipped_before[0] == steps - self._skipped_before[1] > 0:
            raise FloatingPointError(
                f"no gradient was finite in the {steps - self._skipped_before[1]} steps up to {self.step}"
            )
        self._skipped_before = skipped, steps
        return skipped

    def _validate_and_report(self, epoch: int) -> None:
        accuracy = self.validate()
        if self.log:
            self.log.write("validation", self.step, accuracy._asdict())
        self.progress.say(
            f"epoch {epoch}/{self.config.epochs}: validation loss {accuracy.loss:.3f} top-1 {accuracy.top1:.2%} "
            f"top-5 {accuracy.top5:.2%} ({accuracy.num_images:,} images)"
        )


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch; every rank builds the same weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries use the global generator)
    torch.manual_seed(seed)
