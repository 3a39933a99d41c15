"""The same numbers after a run: what metrics.jsonl and the newest checkpoint say, beside what was predicted for noise."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfleet.launch.advise.flips import HALF_ULP, percent
from bitfleet.launch.advise.outlook import LOOKS, Line, Outlook, Verdict
from bitfleet.launch.advise.theory import Snapshot, window
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import latest_checkpoint, read_meta
from bitfleet.trainer.checkpoint.tensors import BITS, OPTIM
from bitfleet.trainer.metrics import read_metrics

FACTOR = 2.0
"""Measured and predicted are called alike within this factor."""


def read_flips(run: Path, *, may_be_none: bool = False) -> dict[int, float]:
    """Step -> flip ratio of every line that a run logged in training.

    Args:
        run: its folder.
        may_be_none: its rule keeps its weights as values, whose signs not every way of sharding counts.

    Raises:
        ValueError: the run has not logged any.
    """
    flips = {
        line["step"]: line["flip_ratio"]
        for line in read_metrics(run)
        if "flip_ratio" in line and line["kind"] == "train"
    }
    if not flips and not may_be_none:
        raise ValueError(
            f"{run} has no flip_ratio in metrics.jsonl: it has not logged a step, or has no binary weights"
        )
    return flips


def steps_to_compare(flips: Mapping[int, float], num_steps: int) -> list[int]:
    """Of the logged steps those nearest to the steps that are looked at, each once."""
    if not flips:
        return []
    wanted = [step for step in (*LOOKS, num_steps // 2, num_steps) if step <= max(flips)] + [max(flips)]
    return sorted({min(flips, key=lambda logged: abs(math.log(logged / max(step, 1)))) for step in wanted})


def measured_lines(run: Path, outlook: Outlook, flips: Mapping[int, float]) -> list[Line]:
    """Predicted and measured, line by line.

    Args:
        run: its folder.
        outlook: of its configuration; the steps of `steps_to_compare` are among its `more_steps`.
        flips: from `read_flips`.
    """
    steps = [step for step in outlook.more_steps if step in flips]
    lines = [_flip_line(outlook.snapshots[step], flips, outlook.num_steps) for step in steps]
    lines += _diagnostics_lines(read_metrics(run), outlook)
    return lines + _checkpoint_lines(run, outlook)


def checkpoint_step(run: Path) -> int | None:
    """The step of the run's newest checkpoint."""
    checkpoint = latest_checkpoint(run)
    return int(read_meta(checkpoint)["step"]) if checkpoint else None


def measured_flip_lines(outlook: Outlook, flips: Mapping[int, float]) -> list[Line]:
    """What was measured where no flips were predicted, beside the target where a controller drives the run."""
    if not flips:
        return [Line("measured: flips", "not logged", "ok", "the weights are values, of whose signs nothing is logged")]
    return [_plain_flip_line(step, outlook, flips) for step in outlook.more_steps]


def _plain_flip_line(step: int, outlook: Outlook, flips: Mapping[int, float]) -> Line:
    measured, over = _around(step, flips, outlook.num_steps)
    title, value = f"measured: flips at step {step:,}", percent(measured)
    if outlook.driven is not None:
        target = outlook.config.optim.transitions.target.over(outlook.decay_steps)(step - 1)
        return Line(
            title, f"{value}, target {percent(target)}", "ok", f"{outlook.driven} is driven towards it ({over})"
        )
    if measured == 0.0 and step <= outlook.middle:
        return Line(title, value, "look", f"no weight flips, and half of the run is still to come ({over})")
    return Line(title, value, "ok", f"there is no prediction for this rule ({over})")


def _around(step: int, flips: Mapping[int, float], num_steps: int) -> tuple[float, str]:
    """The mean of the flips logged around `step`, and over what it is."""
    around = [flips[each] for each in window(step, num_steps) if each in flips]
    over = f"mean of {len(around)} logged steps" if len(around) > 1 else "of this step"
    return math.fsum(around) / len(around), over


def _flip_line(found: Snapshot, flips: Mapping[int, float], num_steps: int) -> Line:
    measured, over = _around(found.step, flips, num_steps)
    value = f"{percent(measured)}, predicted {percent(found.flip_ratio)}"
    verdict, why = _compared(
        measured,
        found.flip_ratio,
        fewer="gradients agree from step to step more than noise does, so m is larger and rarely crosses 0",
        more="gradients turn against the last flips, so m crosses 0 more often than it would on noise",
    )
    return Line(f"measured: flips at step {found.step:,}", value, verdict, f"{why} ({over})")


def _compared(measured: float, predicted: float, *, fewer: str, more: str) -> tuple[Verdict, str]:
    if measured == 0.0 or predicted == 0.0:
        return ("ok", "as predicted") if measured == predicted else ("look", fewer if measured == 0.0 else more)
    times = measured / predicted
    if 1 / FACTOR <= times <= FACTOR:
        return "ok", f"{times:.2f} x the prediction"
    return "look", f"{times:.2g} x the prediction: {fewer if times < 1 else more}"


def _diagnostics_lines(metrics: Sequence[Mapping[str, Any]], outlook: Outlook) -> list[Line]:
    """What the diagnostics of the last logged step add, where the run had them."""
    last = next((line for line in reversed(metrics) if line["kind"] == "diagnostics"), None)
    if last is None:
        return []
    nearest = min(outlook.snapshots.values(), key=lambda found: abs(found.step - last["step"]))
    lines = []
    if (band := last.get("dead_band")) is not None:
        lines.append(_band_line(f"measured: dead band, step {last['step']:,}", band, nearest))
    if (agreement := last.get("sign_agreement")) is not None:
        noise = 0.5 + math.asin(min(1.0, nearest.gamma / (nearest.exp_avg_rms or 1.0))) / math.pi
        verdict: Verdict = "ok" if abs(agreement - noise) < 0.1 else "look"
        why = "of gradients that have the sign of their average; the nearer to noise, the less a single batch says"
        value = f"{agreement:.1%}, of noise {noise:.1%}"
        lines.append(Line(f"measured: sign agreement, step {last['step']:,}", value, verdict, why))
    return lines


def _band_line(title: str, band: float, found: Snapshot) -> Line:
    value = f"{percent(band)}, predicted {percent(found.dead_band)}"
    if band < 0.01 and found.dead_band < 0.01:
        return Line(title, value, "ok", "the threshold hardly matters, as predicted")
    verdict, why = _compared(
        band,
        found.dead_band,
        fewer="r is larger than that of noise, and less is held by the threshold",
        more="r is smaller than that of noise, as where gradients are 0 or alternate, and more is held by the threshold",
    )
    return Line(title, value, verdict, why)


@dataclasses.dataclass(slots=True)
class _Sums:
    """Over the binary weights of a checkpoint."""

    numel: int = 0
    squares: float = 0.0
    """Of r."""
    inside: int = 0
    """|r| <= threshold."""
    still: int = 0
    """m and gamma of a usual gradient further apart than fp32 reaches."""
    silent: int = 0
    """m is 0: no gradient so far."""


def _checkpoint_lines(run: Path, outlook: Outlook) -> list[Line]:
    """Moments of the newest checkpoint, after its last update."""
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        return [Line("measured: moments", "no checkpoint", "look", "the run has none yet: r cannot be measured")]
    step = int(read_meta(checkpoint)["step"])
    sums = _Sums()
    for exp_avg, exp_avg_sq in _moments(checkpoint, outlook.rule.sigma is not None):
        _add(sums, exp_avg, exp_avg_sq, step, outlook)
    if sums.numel == 0:
        why = "its moments are in DeepSpeed's own files (sharding zero), which are not read here"
        return [Line("measured: moments", "not in the checkpoint", "look", why)]
    found = outlook.snapshots[step]
    rms = math.sqrt(sums.squares / sums.numel)
    verdict, why = _compared(
        rms,
        found.ratio_rms,
        fewer="gradients alternate, or most are 0",
        more="gradients have a mean: m is more than noise",
    )
    lines = [
        Line(f"measured: r, step {step:,}", f"{rms:.1e}, predicted {found.ratio_rms:.1e}", verdict, f"{why} (rms)")
    ]
    lines.append(_band_line(f"measured: |r| <= threshold, step {step:,}", sums.inside / sums.numel, found))
    silent, still = sums.silent / sums.numel, sums.still / sums.numel
    why = "of the weights have never had a gradient: they cannot learn" if silent else "every weight has had a gradient"
    lines.append(Line("measured: silent weights", percent(silent), "look" if silent > 0.01 else "ok", why))
    if outlook.rule.sigma is not None:
        usual = f"{outlook.rule.gamma(step - 1):.1e} sqrt(v)"
        why = f"of the weights have an m to which gamma times a usual gradient, {usual}, adds nothing in fp32"
        verdict = "wrong" if still > 0.5 else "look" if still > 0.01 else "ok"
        lines.append(Line("measured: m that stands still", percent(still), verdict, why))
    return lines


def _add(sums: _Sums, exp_avg: Tensor, exp_avg_sq: Tensor | None, step: int, outlook: Outlook) -> None:
    rule = outlook.rule
    second = exp_avg if exp_avg_sq is None else exp_avg_sq
    ratio = rule.ratio(exp_avg.numpy(), second.numpy(), step)
    sums.numel += exp_avg.numel()
    sums.squares += float((ratio.astype("float64") ** 2).sum())
    sums.inside += int((abs(ratio) <= rule.threshold(step - 1)).sum())
    sums.silent += int((exp_avg == 0).sum())
    if exp_avg_sq is not None:
        usual = rule.gamma(step - 1) * exp_avg_sq.sqrt()
        sums.still += int(((usual < HALF_ULP * exp_avg.abs()) & (exp_avg != 0)).sum())


def _moments(checkpoint: Path, has_second: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The moments of each binary weight, flat fp32, one parameter at a time: all together may not fit into memory."""
    names = checkpoint_tensors.contents(checkpoint)
    for name in names:
        key = name.removeprefix(BITS)
        first, second = f"{OPTIM}exp_avg.{key}", f"{OPTIM}exp_avg_sq.{key}"
        if name.startswith(BITS) and first in names and (second in names or not has_second):
            exp_avg = checkpoint_tensors.read(checkpoint, first)[first]
            yield exp_avg, checkpoint_tensors.read(checkpoint, second)[second] if has_second else None
