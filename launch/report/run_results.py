"""A run as its folder tells it: config.json and metrics.jsonl."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfleet.launch.report.sweep_results import Curve
from bitfleet.trainer.metrics import JSONL, LossWatch, read_metrics
from bitfleet.trainer.run.folder import CONFIG

DIAGNOSTICS = ("dead_band", "never_flipped", "oscillators", "sign_agreement")
"""Fractions of the binary weights that lines of the kind "diagnostics" may have."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunResults:
    """A run and what it logged."""

    path: Path
    name: str
    facts: Mapping[str, Any]
    """Content of config.json."""
    lines: tuple[Mapping[str, Any], ...]
    """Of metrics.jsonl."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        config: Mapping[str, Any] = self.facts["config"]
        return config

    def curve(self, kind: str, key: str) -> Curve:
        """The finite numbers of `key` in the lines of `kind`."""
        found = [(line["step"], line[key]) for line in self.lines if line["kind"] == kind and _is_number(line.get(key))]
        return Curve(tuple(step for step, _ in found), tuple(value for _, value in found))

    def layers(self, kind: str, key: str) -> dict[str, Curve]:
        """Parameter -> curve of "<key>/<parameter>", in the order of the model."""
        names = dict.fromkeys(
            each for line in self.lines if line["kind"] == kind for each in line if each.startswith(key + "/")
        )
        return {name.removeprefix(key + "/"): self.curve(kind, name) for name in names}

    def last(self, kind: str) -> Mapping[str, Any]:
        """The last line of `kind`; empty without one."""
        return next((line for line in reversed(self.lines) if line["kind"] == kind), {})

    def histograms(self) -> list[Mapping[str, Any]]:
        """The lines of diagnostics that hold a histogram."""
        return [line for line in self.lines if line["kind"] == "diagnostics" and "log_ratio" in line]

    def threshold_at(self, step: int) -> float:
        """The threshold that was logged last at or before `step`; nan if none was."""
        curve = self.curve("train", "threshold")
        before = [value for at, value in zip(*curve, strict=True) if at <= step]
        return before[-1] if before else next(iter(curve.values), math.nan)

    @property
    def hyperparameters(self) -> list[str]:
        """The scheduled hyperparameters of the configuration that were logged."""
        optim = self.config.get("optim", {})
        scheduled = [key for key, value in optim.items() if isinstance(value, dict) and "start" in value]
        return [key for key in scheduled if self.curve("train", key).steps]


def read_run(path: Path) -> RunResults:
    """The run in the folder `path`.

    Raises:
        ValueError: it is no run folder, or the run has logged nothing yet.
    """
    file = path / CONFIG
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file} of the run {path}: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise ValueError(f"{file} is not the {CONFIG} of a run: it has no resolved configuration under 'config'")
    lines = read_metrics(path)
    if not any(line["kind"] in ("train", "validation") for line in lines):
        raise ValueError(
            f"the run {path} has logged nothing yet: there is no line of training or validation in {JSONL}"
        )
    name = str(facts["config"].get("name", path.name))
    return RunResults(path, name, facts, tuple(lines))


def answer(run: RunResults) -> list[str]:
    """How the run ended, or where it is, in sentences."""
    top1 = run.curve("validation", "top1")
    train = run.last("train")
    steps_per_epoch = train["step"] / train["epoch"] if train.get("epoch") else None
    last_step = int(max(train.get("step", 0), run.last("validation").get("step", 0)))
    sentences = []
    if top1.values:
        best = max(top1.values)
        at = top1.steps[top1.values.index(best)]
        last = run.last("validation")
        top5 = f", top-5 {100 * last['top5']:.1f} %" if _is_number(last.get("top5")) else ""
        step = int(top1.steps[-1])
        where = _place(step, steps_per_epoch, run.config.get("epochs"))
        sentences.append(f"Validation after {where}: top-1 {100 * top1.values[-1]:.1f} %{top5}.")
        if best > top1.values[-1]:
            sentences.append(f"The best was {100 * best:.1f} %, after step {at:,.0f}.")
        if last_step > step:
            sentences.append(f"Training is at {_place(last_step, steps_per_epoch, run.config.get('epochs'))}.")
    else:
        where = _place(last_step, steps_per_epoch, run.config.get("epochs"))
        sentences.append(f"No validation yet; training is at {where}.")
    if _is_number(skipped := train.get("skipped_steps")) and skipped:
        sentences.append(f"{skipped:,} of {train['step']:,} steps were skipped, because a gradient was not finite.")
    if grown := _grown_loss(run):
        sentences.append(grown)
    flips = run.curve("train", "flip_ratio")
    if flips.values:
        sentences.append(
            f"The last logged step flipped {_parts(flips.values[-1])} of the binary weights, the first one "
            f"{_parts(flips.values[0])}."
        )
    return sentences


def _grown_loss(run: RunResults) -> str:
    """Say that the training loss grew by orders of magnitude, if it did and did not come back."""
    losses = run.curve("train", "loss")
    watch = LossWatch(int(run.config.get("model", {}).get("num_classes", 2)))
    said = [watch.sentence(int(step), loss) for step, loss in zip(*losses, strict=True)]
    found = [sentence for sentence in said if sentence]
    return f"{found[-1][0].upper()}{found[-1][1:]}." if found else ""


def summary(run: RunResults) -> list[tuple[str, str]]:
    """The configuration in lines (name, value)."""
    config, model, data, optim = (run.config, *(run.config.get(key, {}) for key in ("model", "data", "optim")))
    rows = [
        ("network", f"{model.get('name')}, {model.get('num_classes')} classes, {model.get('norm')} norm"),
        ("data", f"{data.get('root')}, {data.get('image_size')} pixels, {data.get('augmentation')}"),
        ("length", f"{config.get('epochs')} epochs of batches of {config.get('global_batch_size')}"),
        ("rule", f"{optim.get('rule')}, correction {optim.get('correction')}"),
        *((key, _schedule(value)) for key, value in optim.items() if isinstance(value, dict) and "start" in value),
        ("seed", str(config.get("seed"))),
        (
            "ranks",
            f"{run.facts.get('world_size')} on {run.facts.get('device')}, {run.facts.get('num_replicas')} replicas",
        ),
        ("revision", str(run.facts.get("git"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.facts.get("versions", {}).items())),
        ("folder", str(run.path)),
    ]
    return [(name, value) for name, value in rows if "None" not in value.split()]


def _schedule(value: Mapping[str, Any]) -> str:
    kind, start = value.get("kind", "constant"), value["start"]
    if kind == "constant":
        text = f"{start:g}"
    elif kind == "exponential":
        text = f"{start:g}, times {value.get('rate'):g} every {value.get('num_steps') or 'run'} steps"
    else:
        text = f"{start:g} → {value.get('end', 0.0):g}, {kind}"
        text += f" of power {value['power']:g}" if kind == "polynomial" and value.get("power", 1.0) != 1.0 else ""
    warmup = value.get("warmup_steps")
    return text + (f", warm-up of {warmup} steps" if warmup else "")


def _place(step: int, steps_per_epoch: float | None, epochs: int | None) -> str:
    where = f"step {step:,}"
    return f"{where} (epoch {step / steps_per_epoch:.1f} of {epochs})" if steps_per_epoch and epochs else where


def _parts(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction else "none"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
