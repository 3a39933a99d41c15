"""Read a run folder (config.json and metrics.jsonl) and summarize it."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bitfleet.launch.report.sweep_results import Curve, check_config, read_object
from bitfleet.trainer.distillation import DistillConfig
from bitfleet.trainer.metrics import JSONL, LossWatch, read_metrics
from bitfleet.trainer.run.folder import CONFIG

LEAST_DIP = 0.05
"""Fall of top-1 that is told, beyond three standard deviations of the difference of two
validations."""


class Dip(NamedTuple):
    """A fall of the validation's top-1."""

    step: int
    """Of the lower validation."""
    fall: float


@dataclasses.dataclass(frozen=True, slots=True)
class RunResults:
    """A run and its metrics."""

    path: Path
    name: str
    facts: Mapping[str, Any]
    """Content of config.json."""
    lines: tuple[Mapping[str, Any], ...]
    """Lines of metrics.jsonl."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        config: Mapping[str, Any] = self.facts["config"]
        return config

    def curve(self, kind: str, key: str) -> Curve:
        """Return the finite numbers of `key` in the lines of `kind`."""
        pairs = [(line["step"], line[key]) for line in self.lines if line["kind"] == kind and _is_number(line.get(key))]
        return Curve(tuple(step for step, _ in pairs), tuple(value for _, value in pairs))

    def layers(self, kind: str, key: str) -> dict[str, Curve]:
        """Return parameter -> curve of "<key>/<parameter>", in the order of the model."""
        keys = {
            name: None for line in self.lines if line["kind"] == kind for name in line if name.startswith(key + "/")
        }
        return {name.removeprefix(key + "/"): self.curve(kind, name) for name in keys}

    def last(self, kind: str) -> Mapping[str, Any]:
        """Return the last line of `kind`; empty without one."""
        return next((line for line in reversed(self.lines) if line["kind"] == kind), {})

    def threshold_at(self, step: int) -> float:
        """Return the last threshold that was logged up to `step`; nan without one."""
        curve = self.curve("train", "threshold")
        before = [value for at, value in zip(*curve, strict=True) if at <= step]
        return before[-1] if before else next(iter(curve.values), math.nan)

    @property
    def hyperparameters(self) -> list[str]:
        """The scheduled hyperparameters of the configuration that were logged."""
        return [key for key in _schedules(self.config) if self.curve("train", key).steps]


def read_run(path: Path) -> RunResults:
    """Read the run in the folder `path`.

    Raises:
        ValueError: it is not a run folder, is damaged, or has not logged anything yet.
    """
    facts = read_object(path / CONFIG)
    if not isinstance(facts.get("config"), dict):
        raise ValueError(
            f"{path / CONFIG} is not the {CONFIG} of a run: it has no resolved configuration under 'config'"
        )
    check_config(facts["config"], path / CONFIG)
    for name, schedule in _schedules(facts["config"]).items():
        for key in ("start", "end", "power"):
            if not _is_number(schedule.get(key, 0.0)):
                raise ValueError(f"{path / CONFIG} is damaged: config.optim.{name}.{key} must be a number")
    lines = tuple(read_metrics(path))
    for number, line in enumerate(lines, start=1):
        if not (isinstance(line, dict) and isinstance(line.get("kind"), str) and isinstance(line.get("step"), int)):
            raise ValueError(f"{path / JSONL}:{number} is damaged: expected an object with its kind and step")
    if not any(line["kind"] in ("train", "validation") for line in lines):
        raise ValueError(f"the run {path} has logged nothing yet: {JSONL} has no line of training or validation")
    return RunResults(path, str(facts["config"].get("name", path.name)), facts, lines)


def answer(run: RunResults) -> list[str]:
    """Return sentences on the result of a run, or on its progress."""
    top1, flips = run.curve("validation", "top1"), run.curve("train", "flip_ratio")
    train, last = run.last("train"), run.last("validation")
    last_step = int(max(train.get("step", 0), last.get("step", 0)))
    sentences = []
    if top1.values:
        best = max(top1.values)
        top5 = f", top-5 {100 * last['top5']:.1f} %" if _is_number(last.get("top5")) else ""
        step = int(top1.steps[-1])
        sentences.append(f"Validation after {_epoch_of(run, step)}: top-1 {100 * top1.values[-1]:.1f} %{top5}.")
        if best > top1.values[-1]:
            sentences.append(f"The best was {100 * best:.1f} %, after step {top1.steps[top1.values.index(best)]:,.0f}.")
        if last_step > step:
            sentences.append(f"Training is at {_epoch_of(run, last_step)}.")
    else:
        sentences.append(f"No validation yet; training is at {_epoch_of(run, last_step)}.")
    if _is_number(skipped := train.get("skipped_steps")) and skipped:
        sentences.append(f"{skipped:,} of {train['step']:,} steps were skipped, because a gradient was not finite.")
    watch = LossWatch(int(run.config.get("model", {}).get("num_classes", 2)), scale=_loss_scale(run.config))
    warnings = [watch.sentence(int(step), loss) for step, loss in zip(*run.curve("train", "loss"), strict=True)]
    sentences += [f"{warning[0].upper()}{warning[1:]}." for warning in warnings if warning][-1:]
    if not run.config.get("precise_bn_steps") and flips.values and (dip := largest_dip(run)):
        sentences.append(
            f"Validation fell by {100 * dip.fall:.0f} points at step {dip.step:,} while training did not: BatchNorm's "
            "running averages may lag behind the flips (bitfleet evaluate CHECKPOINT --precise_bn_steps 50)."
        )
    if flips.values:
        first, last_ratio = (
            f"{100 * ratio:.2g} %" if ratio else "none" for ratio in (flips.values[0], flips.values[-1])
        )
        sentences.append(f"The last logged step flipped {last_ratio} of the binary weights, the first one {first}.")
    return sentences


def largest_dip(run: RunResults) -> Dip | None:
    """Return the largest fall of top-1 from one validation to the next while the mean of training's
    top-1 between validations did not fall; None without one beyond chance and `LEAST_DIP`."""
    validation, training = run.curve("validation", "top1"), run.curve("train", "top1")
    num_images = run.last("validation").get("num_images", 0)
    least = max(LEAST_DIP, 3 * math.sqrt(0.5 / num_images)) if _is_number(num_images) and num_images > 0 else LEAST_DIP
    between = [
        [value for at, value in zip(*training, strict=True) if before < at <= step]
        for before, step in itertools.pairwise((0.0, *validation.steps))
    ]
    means = [statistics.fmean(values) if values else math.nan for values in between]
    dips = [
        Dip(int(step), earlier - later)
        for step, (earlier, later), (mean_before, mean) in zip(
            validation.steps[1:], itertools.pairwise(validation.values), itertools.pairwise(means), strict=True
        )
        if earlier - later > least and mean >= mean_before
    ]
    return max(dips, key=lambda dip: dip.fall, default=None)


def summary(run: RunResults) -> list[tuple[str, str]]:
    """Return the configuration as rows (name, value)."""
    config, facts = run.config, run.facts
    model, data, optim = (config.get(key, {}) for key in ("model", "data", "optim"))
    norm = f", {model['norm']} norm" if model.get("norm") else ""
    rows = [
        ("network", f"{model.get('name')}, {model.get('num_classes')} classes{norm}"),
        ("data", f"{data.get('root')}, {data.get('image_size')} pixels, {data.get('augmentation')}"),
        ("length", f"{config.get('epochs')} epochs of batches of {config.get('global_batch_size')}"),
        ("rule", f"{optim.get('rule')}, correction {optim.get('correction')}"),
        *((name, _describe(schedule)) for name, schedule in _schedules(config).items()),
        ("seed", str(config.get("seed"))),
        ("ranks", f"{facts.get('world_size')} on {facts.get('device')}, {facts.get('num_replicas')} replicas"),
        ("revision", str(facts.get("git"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())),
        ("folder", str(run.path)),
    ]
    return [(name, value) for name, value in rows if "None" not in value.split()]


def _loss_scale(config: Mapping[str, Any]) -> float:
    distill = config.get("distill") or {}
    known = {name: distill[name] for name in ("teacher", "temperature", "label_weight") if name in distill}
    return DistillConfig(**known).loss_scale


def _schedules(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    optim = config.get("optim", {})
    return {name: value for name, value in optim.items() if isinstance(value, dict) and "start" in value}


def _describe(schedule: Mapping[str, Any]) -> str:
    kind, start = schedule.get("kind", "constant"), schedule["start"]
    if kind == "constant":
        text = f"{start:g}"
    elif kind == "exponential":
        length, share = schedule.get("num_steps"), schedule.get("share", 1.0)
        stair = f"{length:,} steps" if length else f"{share:g} of the run"
        text = f"{start:g}, times {schedule.get('rate'):g} every {stair}"
    else:
        text = f"{start:g} → {schedule.get('end', 0.0):g}, {kind}"
        power = schedule.get("power", 1.0)
        text += f" of power {power:g}" if kind == "polynomial" and power != 1.0 else ""
        if stairs := schedule.get("stairs"):
            text += f" in {stairs}"
        if length := schedule.get("num_steps"):
            text += f" over {length:,} steps"
        elif (share := schedule.get("share", 1.0)) != 1.0:
            text += f" over {share:g} of the run"
    if delay := schedule.get("delay_steps"):
        text += f", after {delay:,} steps at {start:g}"
    if warmup := schedule.get("warmup_steps"):
        text += f", warm-up of {warmup} steps"
    elif warmup := schedule.get("warmup_epochs"):
        text += f", warm-up of {warmup:g} epochs"
    return text


def _epoch_of(run: RunResults, step: int) -> str:
    train, epochs = run.last("train"), run.config.get("epochs")
    if not train.get("epoch") or not epochs:
        return f"step {step:,}"
    return f"step {step:,} (epoch {step * train['epoch'] / train['step']:.1f} of {epochs})"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
