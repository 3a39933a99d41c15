"""Train: the loop, and the objects that it is built of."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitfleet.models import check_images, compile_network, create_model
from bitfleet.optim import ShardedOptimizer, build_optimizer, driven_values, routing_table
from bitfleet.optim.diagnostics import BitDiagnostics
from bitfleet.trainer.checkpoint import (
    Checkpoints,
    RunFolder,
    TrainState,
    ValidCheckpoint,
    choose_run_folder,
    create_and_lock,
    find_resume_checkpoint,
    identity,
    load_initial_weights,
    model_signature,
    seed_everything,
    seed_state,
    was_compiled,
)
from bitfleet.trainer.config import TrainConfig, resolve_replicas, to_dict, with_precision
from bitfleet.trainer.data import (
    Dataset,
    RecentImages,
    TrainLoader,
    ValidationLoader,
    check_classes,
    normalize,
    open_dataset,
    remembering,
    stream_settings,
)
from bitfleet.trainer.distillation import (
    MEASURES,
    Distillation,
    LogitCache,
    Schedule,
    Teacher,
    file_sha256,
    identity_of_logits,
    load_teacher,
    open_cache,
    precision_on,
)
from bitfleet.trainer.engine.arithmetic import use_arithmetic
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.compilation import eager_on_real_weights, is_compiled
from bitfleet.trainer.engine.config import deepspeed_options
from bitfleet.trainer.engine.engine import create_engine, shard
from bitfleet.trainer.engine.nonfinite import NonfiniteGuard
from bitfleet.trainer.engine.rule_proof import RuleProof
from bitfleet.trainer.engine.step_graph import Batch, CudaRecorder, GraphedStep, check_can_capture
from bitfleet.trainer.evaluate import predict, validate
from bitfleet.trainer.metrics import Accuracy, Reports, StepObserver, hyperparameters_of, step_flips
from bitfleet.trainer.ranks.check_same import check_same_on_all_ranks
from bitfleet.trainer.ranks.collectives import Ranks, broadcast_object
from bitfleet.trainer.ranks.heartbeat import report_step
from bitfleet.trainer.run.folder import write_config
from bitfleet.trainer.run.out_of_memory import is_out_of_memory, training_out_of_memory
from bitfleet.trainer.run.stop import StopWatcher
from bitfleet.trainer.run.versions import versions
from bitfleet.trainer.train_step import TrainStep, label_loss


def open_teacher(
    config: TrainConfig, dataset: Dataset, num_replicas: int, device: torch.device
) -> Teacher | LogitCache:
    """Load the teacher of a run, or open the cache of its logits.

    Raises:
        ValueError: it does not fit the run, or the cache was made for something else.
    """
    distill = config.distill
    if distill.cache is None:
        return load_teacher(distill, num_classes=len(dataset.classes), image_size=config.data.image_size, device=device)
    weights_sha256 = None if distill.weights is None else file_sha256(distill.weights)
    micro_batch_size = config.global_batch_size // num_replicas
    return open_cache(distill.cache, logits_identity(config, dataset, micro_batch_size, device, weights_sha256))


def logits_identity(
    config: TrainConfig, dataset: Dataset, micro_batch_size: int, device: torch.device, weights_sha256: str | None
) -> dict[str, Any]:
    """Return what decides the logits of a run's teacher; see `identity_of_logits`."""
    return identity_of_logits(
        teacher=config.distill.teacher,
        from_file=config.distill.weights is not None,
        weights_sha256=weights_sha256,
        num_classes=len(dataset.classes),
        precision=precision_on(device),
        seed=config.seed,
        data_sha=dataset.sha,
        images=stream_settings(config.data, device.type),
        micro_batch_size=micro_batch_size,
    )


class Trainer:
    """Build everything that a run needs; `train()` runs it.

    Args:
        config: the run.
        ranks: this process's place; the process group exists.
        device: where the model runs.

    Raises:
        ValueError: anything about configuration, data, run folder or checkpoint that does not fit.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        self.folder = self._choose_folder()
        self._lock = create_and_lock(self.folder) if self.folder.checkpoint and ranks.is_main else None
        self.resume_from = resume_from = find_resume_checkpoint(self.folder, ranks)
        """Checkpoint to continue from; None for a new run."""
        self.config = config = with_precision(
            config, device.type, resume_from.meta.get("engine.precision") if resume_from else None
        )
        use_arithmetic(device, config.engine)
        self.num_replicas = self._resolve_replicas(resume_from)
        options = deepspeed_options(
            config.engine,
            global_batch_size=config.global_batch_size,
            num_replicas=self.num_replicas,
            world_size=ranks.world_size,
        )
        self._open_data()
        self.num_steps = config.epochs * self.loader.steps_per_epoch
        self.distillation = self._open_distillation(resume_from) if config.distill.teacher else None
        self._build_network(resume_from)
        # As the paper's code: decay_steps = epochs * images // batch, a little longer than the run
        # of whole batches.
        decay_steps = config.epochs * len(self.dataset.train) // config.global_batch_size
        self.optimizer, schedules = build_optimizer(
            self.model,
            config.optim,
            num_steps=decay_steps,
            num_epochs=config.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
            seed=config.seed,
        )
        signature = model_signature(self.model)
        self._proof = None if resume_from else RuleProof(self.model, config.optim.rule, config.engine)
        self.sharded = shard(self.optimizer, config.engine, self.num_replicas)
        if config.init is not None and resume_from is None:
            self.sharded.start_signs()  # of a first stage, whose weights are real
        self.routing = routing_table(self.optimizer)
        if config.engine.cuda_graph:
            check_can_capture(ranks, device, self.optimizer)
        self.engine = create_engine(self.model, self.sharded, schedules, options, device)
        self.statistics = RunningStatistics(self.model, self.num_replicas)
        diagnostics = self._open_diagnostics()
        self.observer = self._make_observer(diagnostics)
        state = TrainState(self.engine, self.model, self.sharded, signature, diagnostics)
        self.checkpoints = self._make_checkpoints(state)
        self.step = self._resume(resume_from) if resume_from else 0
        report_step(self.step)
        # A new run takes its folder last: what is refused leaves none behind.
        if ranks.is_main and self._lock is None:
            self._lock = create_and_lock(self.folder)
        self._make_step = self._step_maker()
        self._guard = self._nonfinite_guard()
        self._recent: RecentImages | None = None
        self.stopped_by = ""
        """Reason for an early stop, or ""."""
        self.around_step: Callable[[], AbstractContextManager[None]] = nullcontext
        """Context manager wrapped around each step, for profilers."""
        self.after_validation: Callable[[int, Accuracy], str] = lambda step, accuracy: ""
        """Callback that returns a message to print after a validation, from steps and accuracy."""

    def _choose_folder(self) -> RunFolder:
        config = self.config
        runs = config.output / config.name
        chosen = choose_run_folder(runs, config.run_dir, config.resume) if self.ranks.is_main else None
        folder: RunFolder = broadcast_object(chosen)  # type: ignore[assignment]
        return folder

    def _make_checkpoints(self, state: TrainState) -> Checkpoints:
        config, ranks, resolved = self.config, self.ranks, to_dict(self.config)
        constants = {
            "config": resolved,
            "versions": versions(),
            "classes": list(self.dataset.classes),
            "num_threads": torch.get_num_threads(),
        }
        return Checkpoints(
            config.checkpoint,
            self.folder,
            ranks,
            state,
            identity=identity(
                resolved,
                self.num_replicas,
                ranks.world_size,
                self.dataset.sha,
                compiled=self.compiled,
                teacher_sha=self.distillation.weights_sha256 if self.distillation else "",
            ),
            constants=constants,
            steps_per_epoch=self.loader.steps_per_epoch,
            global_batch_size=config.global_batch_size,
        )

    def _build_network(self, resume_from: ValidCheckpoint | None) -> None:
        config = self.config
        check_images(config.model, config.data.image_size, config.global_batch_size // self.num_replicas)
        seed_everything(config.seed)
        self.model = self._create_model(resume_from).to(self.device)
        before = was_compiled(resume_from.meta) if resume_from else None
        self.compiled = is_compiled(config.model.compile, self.device, config.engine.sharding, before)
        """True if the network is compiled."""
        if self.compiled:
            compile_network(self.model)

    def _create_model(self, resume_from: ValidCheckpoint | None) -> nn.Module:
        """Build the network, on the CPU; a checkpoint that is continued brings its weights
        later."""
        config = self.config
        if resume_from is not None:
            # It says itself whether the binary weights are signs, or real values before their first
            # update.
            return create_model(replace(config.model, initial_weights="signs"))
        model = create_model(config.model)
        if config.init is not None:
            new_head = config.init_head == "new"
            load_initial_weights(model, config.model, config.init, config.init_scales, new_head=new_head)
        return model

    def _open_diagnostics(self) -> BitDiagnostics | None:
        if not self.config.metrics.diagnostics:
            return None
        assert isinstance(self.sharded, ShardedOptimizer), self.config.engine.sharding
        return BitDiagnostics(self.sharded)

    def _make_observer(self, diagnostics: BitDiagnostics | None) -> StepObserver:
        return StepObserver(
            self.ranks,
            self.device,
            step_flips(self.engine, self.model, self.sharded, self.ranks, diagnostics),
            counts_replaced=self.config.data.on_bad_sample == "replace",
            measures=MEASURES if self.distillation else (),
        )

    def _resolve_replicas(self, resume_from: ValidCheckpoint | None) -> int:
        """Return the number of replicas. A resumed run keeps its number, and its number of threads,
        unless they are set."""
        config = self.config
        if resume_from is None:
            return resolve_replicas(config, self.ranks.world_size)
        if config.num_threads is None and self.device.type == "cpu":
            torch.set_num_threads(resume_from.meta["num_threads"])  # equal bits need equal threads
        return resolve_replicas(config, self.ranks.world_size, resume_from.meta["num_replicas"])

    def _step_maker(self) -> TrainStep | GraphedStep:
        config = self.config
        step = TrainStep(
            self.engine,
            self.model,
            self.sharded,
            self.statistics,
            self.observer,
            normalize=self._normalize,
            precision=config.engine.precision,
            num_micro_batches=self._num_micro_batches,
            label_smoothing=config.data.label_smoothing,
            distillation=self.distillation,
        )
        if not config.engine.cuda_graph:
            return step
        assert isinstance(self.sharded, ShardedOptimizer)
        end_step, recorder = self.engine.lr_scheduler.step, CudaRecorder(self.device)
        return GraphedStep(step, self.sharded, end_step, recorder, config.model.name)

    def _nonfinite_guard(self) -> NonfiniteGuard:
        config = self.config
        extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 1, 1, 3)
        bad_inputs = ""
        if not bool(self._normalize(extremes).isfinite().all()):
            bad_inputs = f"pixels are not finite after data.mean {config.data.mean} and data.std {config.data.std}"
        return NonfiniteGuard(
            config.engine,
            self.engine,
            self.model,
            self.sharded,
            save=self._save_and_wait,
            init=config.init,
            bad_inputs=bad_inputs,
        )

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.config.data.mean, self.config.data.std)

    def _open_data(self) -> None:
        config, ranks = self.config, self.ranks
        self.dataset = open_dataset(config.data)
        check_same_on_all_ranks(ranks, {f"the lists of images in {config.data.root} (sha256)": self.dataset.sha})
        check_classes(self.dataset, config.model.num_classes, config.data.root)
        place = {"rank": ranks.rank, "world_size": ranks.world_size, "local_world_size": ranks.local_world_size}
        self.loader = TrainLoader(
            self.dataset,
            config.data,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            num_replicas=self.num_replicas,
            device=self.device,
            **place,
        )
        self.validation_loader = ValidationLoader(self.dataset, config.data, device=self.device, **place)

    def _open_distillation(self, resume_from: ValidCheckpoint | None) -> Distillation:
        config, ranks = self.config, self.ranks
        source = open_teacher(config, self.dataset, self.num_replicas, self.device)
        check_same_on_all_ranks(ranks, {"the weights of the teacher (sha256)": source.weights_sha256})
        schedule = Schedule(
            self.loader.steps_per_epoch,
            config.global_batch_size,
            self.num_replicas,
            ranks.rank,
            ranks.world_size,
            min(config.stop_after_steps or self.num_steps, self.num_steps),
        )
        distillation = Distillation(
            config.distill,
            source,
            schedule,
            normalize=self._normalize,
            device=self.device,
            label_smoothing=config.data.label_smoothing,
        )
        distillation.check_can_continue(resume_from.meta["step"] if resume_from else 0)
        return distillation

    def _resume(self, resume_from: ValidCheckpoint) -> int:
        step = self.checkpoints.resume(resume_from)
        if self.ranks.is_main:
            self.observer.load([math.nan if each is None else each for each in resume_from.meta["meter"]])
        return step

    @property
    def _num_micro_batches(self) -> int:
        """Micro-batches per step on this rank."""
        return self.num_replicas // self.ranks.world_size

    @property
    def num_skipped_steps(self) -> int:
        """Steps so far that were skipped because a gradient was not finite (sharding "bits")."""
        return self.sharded.num_skipped_steps if isinstance(self.sharded, ShardedOptimizer) else 0

    def save(self) -> None:
        """Start to save the current step; every rank calls this."""
        self.reports.flush()
        self.checkpoints.save(self.step, meter=self.observer.meter.peek(), metrics=self.reports.latest)

    def train_step(self) -> None:
        """Make one optimizer step over this rank's micro-batches.

        Raises:
            FloatingPointError: a gradient is not finite, and `engine.on_nonfinite` is "stop".
        """
        with eager_on_real_weights(self.compiled, self.device, self.sharded):
            self._make_step.run(self.batches)
        self._guard.check_step(self.step + 1)
        self.step += 1
        report_step(self.step)

    def _save_and_wait(self) -> None:
        self.save()
        self.checkpoints.saver.flush()

    def start(self) -> None:
        """Open the run's reports and the stream of batches at the current step."""
        config, ranks = self.config, self.ranks
        if ranks.is_main:
            facts = {
                "world_size": ranks.world_size,
                "num_replicas": self.num_replicas,
                "device": str(self.device),
                "data_sha": self.dataset.sha,
            }
            write_config(self.folder.path, to_dict(config), facts)
        self.reports = Reports(
            self.folder.path,
            ranks,
            step=self.step,
            num_steps=self.num_steps,
            num_epochs=config.epochs,
            num_classes=config.model.num_classes,
            loss_scale=config.distill.loss_scale,
            scales_loss=config.engine.precision == "fp16",
            routing=self.routing,
            has_journal=config.journal.enabled,
            optimizer=self.sharded,
        )
        if config.init and self.resume_from is None and config.optim.init_inertia and self.step == 0:
            self._seed_state()
        self.batches = self._open_stream()
        if self.distillation is not None:
            self.distillation.start(self.step)
        self.engine.train()
        self.observer.stopwatch.read()

    def _open_stream(self) -> Iterator[Batch]:
        num_steps = self.config.precise_bn_steps
        if num_steps is None:
            return self.loader.batches(self.step)
        self._recent = remembering(self.loader, self.step, num_steps, self._num_micro_batches)
        return self._recent

    def _seed_state(self) -> None:
        assert isinstance(self.sharded, ShardedOptimizer)
        batches: Iterator[Batch] = self.loader.batches()
        if self.distillation is not None:
            self.distillation.start(0)
            batches = map(self.distillation.with_targets, self.loader.batches())
        sentence = seed_state(
            self.model,
            self.sharded,
            self.statistics,
            batches,
            normalize=self._normalize,
            loss=self.distillation.loss
            if self.distillation
            else functools.partial(label_loss, label_smoothing=self.config.data.label_smoothing),
            precision=self.config.engine.precision,
            inertia=self.config.optim.init_inertia,
            num_micro_batches=self._num_micro_batches,
            num_steps=self.num_steps,
            schedules=self.engine.lr_scheduler.schedules,
        )
        self.reports.say(f"began from {self.config.init}: {sentence}")

    def advance(self) -> None:
        """Make one step; on a logging step also sync with the device and report."""
        if (self.step + 1) % self.config.metrics.every_steps and self.step + 1 != self.num_steps:
            self.train_step()
            return
        self.observer.flips.before_step()
        hyperparameters = hyperparameters_of(self.optimizer)
        self.train_step()
        self._report(hyperparameters | driven_values(self.optimizer.param_groups))

    def train(self) -> None:
        """Run from the current step to the end, to `stop_after_steps`, or to a request to stop
        (`stopped_by`).

        Raises:
            FloatingPointError: losses or gradients are not finite, or every step is skipped for it;
                the state before is saved.
            ValueError: a checkpoint could not be written, or memory has run out.
        """
        last = min(self.num_steps, self.config.stop_after_steps or self.num_steps)
        with StopWatcher(self.folder.path, self.ranks, launched=self.ranks.launched) as stop:
            try:
                self._run_steps(last, stop)
            except Exception as error:
                self.checkpoints.saver.wait_briefly()
                if is_out_of_memory(error):
                    raise ValueError(self._out_of_memory(error)) from error
                raise
            self.seconds_to_stop = time.monotonic() - stop.seen_at if stop.seen_at is not None else 0.0

    def _out_of_memory(self, error: Exception) -> str:
        return training_out_of_memory(
            error,
            precision=self.config.engine.precision,
            micro_batch_size=self.config.global_batch_size // self.num_replicas,
            num_replicas=self.num_replicas,
            device=self.device,
        )

    def _run_steps(self, last: int, stop: StopWatcher) -> None:
        self.start()
        if self.folder.branches:  # or what is interrupted before the first save would start from step 0
            self.save()
        if self._proof is not None:
            self._proof.begin(self.sharded)
        if self.step and self._validation_is_due() and not self.reports.has_validation(self.step):
            self._validate(stop)  # the run was stopped before it
        while self.step < last and not self.stopped_by:
            start = time.perf_counter()
            with self.around_step():
                self.advance()
            if self._proof is not None:
                self._prove(self._proof)
            self.checkpoints.saver.check()
            self.stopped_by, save_now = stop.after_step(self.checkpoints.by_time())
            if sentence := self.checkpoints.shutdown_message(time.perf_counter() - start):
                self.reports.say(sentence)
            if save_now or self.stopped_by or self.step == last or self.checkpoints.by_step(self.step):
                self.save()
            if not self.stopped_by and self._validation_is_due():
                self._validate(stop)
        if self.stopped_by:
            self.save()
        self.checkpoints.saver.flush()
        if not self.stopped_by:
            self._guard.check_end(self.step, self.num_steps, since_report=self._since_report())
        self.reports.skipped(self.step, self.num_skipped_steps)
        self.stop()

    def _since_report(self) -> tuple[float, int] | None:
        """Return the sum of losses and the number of images since the last report; None if that was
        in this step."""
        if self.step % self.config.metrics.every_steps == 0 or self.step == self.num_steps:
            return None
        loss, _, _, num_images, *_ = self.observer.meter.peek()
        return loss, int(num_images)

    def _prove(self, proof: RuleProof) -> None:
        """Stop the run unless its first step that was not skipped has updated every binary
        weight."""
        sharded = self.sharded
        if isinstance(sharded, ShardedOptimizer):
            is_skipped = sharded.updated is False
        else:
            is_skipped = self.engine.skipped_steps == self.step
        if is_skipped:
            return
        self._proof = None
        self.reports.say(proof.end(self.sharded, self.step))

    def stop(self) -> None:
        """Close what `start` opened, and release the run folder."""
        self.reports.close()
        if self._lock is not None:
            self._lock.close()

    def _validation_is_due(self) -> bool:
        epoch, rest = divmod(self.step, self.loader.steps_per_epoch)
        return rest == 0 and (epoch % self.config.validate_every_epochs == 0 or self.step == self.num_steps)

    def _validate(self, stop: StopWatcher) -> None:
        """Validate and report, unless a stop is asked for meanwhile: it is done when the run is
        resumed."""

        def must_stop() -> bool:
            self.stopped_by, _ = stop.agree()
            return bool(self.stopped_by)

        start = time.perf_counter()
        with self._statistics_to_validate():
            accuracy = validate(self.model, self.validation_loader, self.config, self.device, must_stop)
        if accuracy is not None:
            self.reports.validation(self.step, accuracy, self.after_validation(self.step, accuracy))
        self.observer.stopwatch.leave_out(time.perf_counter() - start)  # images/s are those of the steps

    def _statistics_to_validate(self) -> AbstractContextManager[None]:
        """Return a context with the BatchNorm statistics of a validation."""
        if self._recent is None:
            return nullcontext()
        steps = self._recent.steps(self._num_micro_batches)
        return self.statistics.precise(
            self.model, steps, functools.partial(predict, self.model, self.config, self.device)
        )

    def _report(self, hyperparameters: dict[str, float]) -> None:
        report = self.observer.read(
            num_skipped_steps=lambda: self.num_skipped_steps,
            num_replaced=self.loader.num_replaced,
            log=self.reports.say,
        )
        self.reports.train(self.step, report, hyperparameters)
        self._guard.check_report(self.step, report.train.loss, report.train.num_images)
        self.reports.diagnostics(self.step, report.diagnostics)
