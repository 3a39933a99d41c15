"""Compose the configuration of a run from those of its parts, and check what concerns more than one
of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bitfleet.models import ModelConfig
from bitfleet.optim import OptimConfig, Schedule
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.data import DataConfig
from bitfleet.trainer.distillation import DistillConfig
from bitfleet.trainer.engine.config import EngineConfig, resolve_precision
from bitfleet.trainer.journal.config import JournalConfig
from bitfleet.trainer.metrics.config import MetricsConfig
from bitfleet.trainer.run.folder import CONFIG, read_resolved
from bitfleet.trainer.run.roles import role


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Configuration of a run."""

    name: str = dataclasses.field(metadata=role("habit"))
    """Name of the configuration; runs are written below `output`/`name`."""
    epochs: int
    """Length of the run and of its schedules."""
    global_batch_size: int
    """Images per optimizer step, over all ranks."""
    num_replicas: int | None = None
    """Micro-batches per step, each with its own BatchNorm statistics; a multiple of the number of
    ranks. None: one per rank."""
    seed: int = 0
    """Seed of the initial weights, the sample order, crops and flips."""
    device: Literal["auto", "cpu", "gpu"] = dataclasses.field(default="auto", metadata=role("machine"))
    """Device of the model; auto is CUDA if torch finds it."""
    num_threads: int | None = dataclasses.field(default=None, metadata=role("machine"))
    """CPU threads per rank. None: the cores of the machine divided by its ranks. Results are
    bit-identical across numbers of ranks only if this is equal."""
    validate_every_epochs: int = dataclasses.field(default=1, metadata=role("habit"))
    """Validate every N epochs, and at the end."""
    precise_bn_steps: int | None = None
    """Validate with the BatchNorm statistics of the training images of the last N optimizer steps
    under the present weights ("precise BN"): running averages lag behind weights that flip.
    Training does not change. None: the running averages, as in the paper's code."""
    output: Path = dataclasses.field(default=Path("runs"), metadata=role("place"))
    """Folder of all runs."""
    run_dir: Path | None = dataclasses.field(default=None, metadata=role("place"))
    """Folder of this run. None: a new one, `output`/`name`/<date and time>."""
    resume: str | None = dataclasses.field(default=None, metadata=role("place"))
    """auto: continue the newest run (or `run_dir`) if there is one. A path: continue that run
    folder or checkpoint."""
    init: Path | None = None
    """Weights to start from: a run folder or checkpoint, a file of `bitfleet checkpoint weights`,
    PyTorch's .pth or .pth.tar, or Keras' .npz, .h5 or .keras. The state of a rule that flips
    weights is seeded so that they keep their signs (optim.init_inertia). None: random ones."""
    init_head: Literal["loaded", "new"] = "loaded"
    """new: the layers whose size depends on the number of classes start at random, as for other
    classes than those of `init`."""
    init_scales: Literal["none", "larq-zoo"] = "none"
    """larq-zoo: binary kernels of the Keras file carry a scale per filter, which goes into the
    BatchNorm after it."""
    stop_after_steps: int | None = dataclasses.field(default=None, metadata=role("habit"))
    """Stop with a checkpoint after N optimizer steps. The schedules keep their length."""
    preflight: Literal["basic", "full"] = dataclasses.field(default="basic", metadata=role("machine"))
    """Checks of the run. basic: the bytes sent per step are counted; memory and time are measured
    in the first steps. full: before that, two optimizer steps on its data, a save, and reading it
    back on this and on other numbers of ranks."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig, metadata=role("habit"))
    metrics: MetricsConfig = dataclasses.field(default_factory=MetricsConfig, metadata=role("habit"))
    journal: JournalConfig = dataclasses.field(default_factory=JournalConfig, metadata=role("habit"))

    def __post_init__(self) -> None:
        self._check_fields()
        self._check_sharding()
        self._check_parts()

    def _check_fields(self) -> None:
        for name in (
            "epochs",
            "global_batch_size",
            "num_replicas",
            "num_threads",
            "validate_every_epochs",
            "precise_bn_steps",
            "stop_after_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ValueError(
                f"name must be that of one folder, not {self.name!r}: choose the folder above it with --output"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")
        schedules = {name: getattr(self.optim, name) for name in ("lr", *self.optim.hyperparameters)}
        for name, schedule in (schedules | {"transitions.target": self.optim.transitions.target}).items():
            if isinstance(schedule, Schedule) and schedule.warmup_epochs >= self.epochs:
                raise ValueError(
                    f"optim.{name}.warmup_epochs is {schedule.warmup_epochs:g}, and the run has {self.epochs} epochs: "
                    "warm up for less"
                )

    def _check_sharding(self) -> None:
        """Refuse what does not work with `engine.sharding`."""
        sharding = self.engine.sharding
        if self.metrics.diagnostics and sharding != "bits":
            raise ValueError(
                f"metrics.diagnostics are counted in the step of engine.sharding bits, but that is {sharding!r}: "
                "leave them out, or use --engine.sharding bits"
            )
        if self.model.compile == "on" and sharding == "zero3":
            raise ValueError(
                'model.compile on does not work with engine.sharding "zero3", which takes the weights apart around '
                "every layer: choose another sharding, or set model.compile to auto or off"
            )
        if self.init is not None and self.optim.init_inertia and sharding != "bits":
            raise ValueError(
                f'--init seeds the optimizer under engine.sharding "bits", not {sharding!r}: choose that sharding, '
                "or pass --optim.init_inertia 0, with which most rules flip half of the binary weights at once"
            )
        if self.optim.transitions.drives != "off" and sharding != "bits":
            raise ValueError(
                f'optim.transitions needs engine.sharding "bits", which counts the flips, not {sharding!r}: set '
                "optim.transitions.drives to off or choose that sharding"
            )
        if RULES[self.optim.rule].begin_ is not None and self.engine.stage > 0:
            raise ValueError(
                f'optim.rule {self.optim.rule} needs engine.sharding "bits" or "none", not {sharding!r}: its state '
                "starts with random numbers for each weight, and DeepSpeed's slices do not say which weights they hold"
            )
        if self.journal.enabled and sharding != "bits":
            raise ValueError(f'journal.enabled needs engine.sharding "bits", not "{sharding}"')

    def _check_parts(self) -> None:
        """Refuse fields of different parts that contradict each other."""
        if self.init_head == "new" and self.init is None:
            raise ValueError("init_head new says what is not taken from the weights of --init: pass that as well")
        if self.distill.cache is not None and self.data.on_bad_sample == "replace":
            raise ValueError(
                "data.on_bad_sample replace takes images whose logits distill.cache does not know: set broken images "
                "aside with bitfleet data verify, or leave distill.cache out"
            )
        if self.distill.teacher and not self.distill.label_weight and self.data.label_smoothing:
            raise ValueError(
                f"data.label_smoothing is {self.data.label_smoothing}, but labels are not used: set "
                "distill.label_weight above 0, or leave it out"
            )
        on_host = {
            "metrics.diagnostics": self.metrics.diagnostics,
            "journal.enabled": self.journal.enabled,
            "optim.transitions": self.optim.transitions.drives != "off",
        }
        if self.engine.cuda_graph and any(on_host.values()):
            names = " and ".join(name for name, is_on in on_host.items() if is_on)
            raise ValueError(f"engine.cuda_graph cannot hold what looks at every step on the host: leave out {names}")


def resolve_replicas(config: TrainConfig, world_size: int, before: int | None = None) -> int:
    """Return the number of replicas on `world_size` ranks.

    Args:
        config: its num_replicas may be None.
        world_size: number of ranks.
        before: replicas of the run to resume; they are kept if the configuration leaves them unset.

    Raises:
        ValueError: ranks, replicas and batch do not divide.
    """
    num_replicas = config.num_replicas or before or world_size
    if num_replicas % world_size and before and config.num_replicas is None:
        raise ValueError(
            f"the run has {before} replicas, which {world_size} ranks cannot share equally: continue it on a number of "
            f"ranks that divides {before}; to change the number of ranks later, start the run with --num_replicas"
        )
    if num_replicas % world_size:
        raise ValueError(
            f"num_replicas is {num_replicas}, which {world_size} ranks cannot share equally: "
            f"start a number of ranks that divides it, or set --num_replicas to a multiple of {world_size}"
        )
    if config.global_batch_size % num_replicas:
        raise ValueError(
            f"global_batch_size is {config.global_batch_size}, which {num_replicas} replicas on {world_size} "
            "ranks cannot share equally: start a number of ranks that divides it, or set --global_batch_size to a "
            f"multiple of {num_replicas}"
        )
    return num_replicas


def with_precision(config: TrainConfig, device_type: str, before: str | None = None) -> TrainConfig:
    """Return `config` with the precision that the run computes in, in place of "auto".

    Args:
        config: of the run.
        device_type: of the device that the model runs on.
        before: precision of the run to resume; it is kept if the configuration is "auto".

    Raises:
        ValueError: the device does not have that precision.
    """
    wanted = config.engine.precision
    if wanted == "auto" and before == "tf32" and device_type != "cuda":
        raise ValueError(
            "the run was started on a GPU in precision tf32, which a CPU does not have: continue it on a GPU, or start "
            "another run from its weights (bitfleet checkpoint weights, --init)"
        )
    if wanted == "auto" and before is not None:
        wanted = before  # type: ignore[assignment]  # EngineConfig has checked it
    precision = resolve_precision(wanted, device_type)
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return `config` as JSON types."""
    resolved: dict[str, Any] = json.loads(TypeAdapter(TrainConfig).dump_json(config))
    return resolved


def read_config(run: Path) -> TrainConfig:
    """Return the configuration of the run at `run`.

    Raises:
        ValueError: there is no run, or its file is damaged or holds what is no longer accepted.
    """
    resolved = read_resolved(run)
    try:
        return from_dict(resolved)
    except ValidationError as error:
        (first, *_) = error.errors()
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":  # ours name the field
            reason = f"{'.'.join(map(str, first['loc']))}: {reason}"
        raise ValueError(
            f"{run / CONFIG} holds a configuration that this version does not accept ({reason}): correct it, or use "
            "the version that wrote it"
        ) from error


def from_dict(resolved: dict[str, Any]) -> TrainConfig:
    """Return the configuration that `to_dict` serialized."""
    return TypeAdapter(TrainConfig).validate_python(resolved)
