"""Compare metrics.jsonl and the newest checkpoint of a run with what was predicted for noise."""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfleet.launch.advise.outlook import STEPS, Line, Outlook, Verdict
from bitfleet.launch.advise.rules import HALF_ULP
from bitfleet.launch.advise.theory import FlipRule, Snapshot, window
from bitfleet.launch.text import rough_percent
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import latest_checkpoint, step_of
from bitfleet.trainer.checkpoint.tensors import BITS, OPTIM
from bitfleet.trainer.metrics import read_metrics

FACTOR = 2.0  # within which measured and predicted agree


def read_flips(run: Path) -> dict[int, float]:
    """Return step -> flip ratio of every training line that has one."""
    lines = [line for line in read_metrics(run) if line["kind"] == "train" and "flip_ratio" in line]
    return {line["step"]: line["flip_ratio"] for line in lines}


def steps_to_compare(flips: Mapping[int, float], num_steps: int) -> list[int]:
    """Return the logged steps nearest to those of a prediction, in ascending order."""
    last = max(flips, default=0)
    wanted = [step for step in (*STEPS, num_steps // 2, num_steps) if step <= last] + [last] * bool(flips)
    return sorted({min(flips, key=lambda logged: abs(math.log(logged / max(step, 1)))) for step in wanted})


def measured_lines(run: Path, outlook: Outlook, flips: Mapping[int, float]) -> list[Line]:
    """Return the measurements, with the prediction or a controller's target if there is one.

    `more_steps` of `outlook` are the steps to compare, and that of the newest checkpoint.
    """
    lines = [_flip_line(step, outlook, flips) for step in sorted(set(outlook.more_steps)) if step in flips]
    if not flips:
        lines = [Line("measured: flips", "not logged", "ok", "the weights are values, whose signs are not counted")]
    if outlook.rule is None or outlook.driven is not None:
        return lines
    diagnostics = [line for line in read_metrics(run) if line["kind"] == "diagnostics"][-1:]
    lines += [line for last in diagnostics for line in _diagnostics_lines(last, outlook)]
    return lines + _checkpoint_lines(run, outlook, outlook.rule)


def _flip_line(step: int, outlook: Outlook, flips: Mapping[int, float]) -> Line:
    around = [flips[near] for near in window(step, outlook.num_steps) if near in flips]
    measured = math.fsum(around) / len(around)
    title, value = f"measured: flips at step {step:,}", rough_percent(measured)
    verdict: Verdict = "ok"
    reason = "no prediction for this rule"
    if outlook.driven is not None:
        target = outlook.lasting(outlook.config.optim.transitions.target)(step - 1)
        value, reason = f"{value}, target {rough_percent(target)}", f"{outlook.driven} is driven towards it"
    elif outlook.rule is not None:
        predicted = outlook.snapshots[step].flip_ratio
        value += f", predicted {rough_percent(predicted)}"
        less = "gradients agree from step to step more than noise does, so m is larger and rarely crosses 0"
        more = "gradients turn against the last flips, so m crosses 0 more often than it would on noise"
        verdict, reason = _compared(measured, predicted, less, more)
    elif measured == 0.0 and step <= outlook.middle:
        verdict, reason = "look", "no weight flips, and half of the run is still to come"
    return Line(title, value, verdict, f"{reason} (logged steps: {len(around)})")


def _compared(measured: float, predicted: float, less: str, more: str) -> tuple[Verdict, str]:
    if measured == predicted:
        return "ok", "as predicted"
    times = measured / predicted if predicted else math.inf
    verdict: Verdict = "ok" if 1 / FACTOR <= times <= FACTOR else "look"
    reason = f"{times:.2g} x the prediction"
    return verdict, reason if verdict == "ok" else f"{reason}: {less if times < 1 else more}"


def _band_line(title: str, band: float, snapshot: Snapshot) -> Line:
    value = f"{rough_percent(band)}, predicted {rough_percent(snapshot.dead_band)}"
    if band < 0.01 and snapshot.dead_band < 0.01:
        return Line(title, value, "ok", "the threshold hardly matters, as predicted")
    less = "r is larger than that of noise, and the threshold holds fewer weights"
    more = "r is smaller than that of noise, as if gradients were 0 or alternated, and the threshold holds more weights"
    return Line(title, value, *_compared(band, snapshot.dead_band, less, more))


def _diagnostics_lines(last: Mapping[str, Any], outlook: Outlook) -> list[Line]:
    nearest = min(outlook.snapshots.values(), key=lambda snapshot: abs(snapshot.step - last["step"]))
    lines = []
    if (band := last.get("dead_band")) is not None:
        lines.append(_band_line(f"measured: dead band, step {last['step']:,}", band, nearest))
    if (agreement := last.get("sign_agreement")) is not None:
        noise = 0.5 + math.asin(min(1.0, nearest.gamma / (nearest.exp_avg_rms or 1.0))) / math.pi
        title, value = f"measured: sign agreement, step {last['step']:,}", f"{agreement:.1%}, of noise {noise:.1%}"
        reason = "gradients with the sign of their average; the nearer to noise, the less a single batch says"
        lines.append(Line(title, value, "ok" if abs(agreement - noise) < 0.1 else "look", reason))
    return lines


def _checkpoint_lines(run: Path, outlook: Outlook, rule: FlipRule) -> list[Line]:
    """Return what the moments of the newest checkpoint say."""
    checkpoint = latest_checkpoint(run)
    step = step_of(checkpoint) if checkpoint else 0
    means = _moment_means(checkpoint, rule, step) if checkpoint and step else {}
    if not means:
        reason = "there is no checkpoint, or the moments are in DeepSpeed's own files (sharding zero)"
        return [Line("measured: moments", "not measured", "look", reason)]
    snapshot, rms, silent = outlook.snapshots[step], means["square"] ** 0.5, means["silent"]
    value = f"{rms:.1e}, predicted {snapshot.ratio_rms:.1e}"
    less, more = "gradients alternate, or most are 0", "gradients have a mean: m is more than noise"
    lines = [
        Line(f"measured: r, step {step:,}", value, *_compared(rms, snapshot.ratio_rms, less, more)),
        _band_line(f"measured: |r| <= threshold, step {step:,}", means["inside"], snapshot),
    ]
    reason = "weights that have never had a gradient cannot learn"
    lines.append(Line("measured: silent weights", rough_percent(silent), "look" if silent > 0.01 else "ok", reason))
    if rule.sigma is not None:
        still = means["still"]
        reason = f"weights to whose m a usual gradient, {rule.gamma(step - 1):.1e} sqrt(v), adds nothing in fp32"
        verdict: Verdict = "wrong" if still > 0.5 else "look" if still > 0.01 else "ok"
        lines.append(Line("measured: m that stands still", rough_percent(still), verdict, reason))
    return lines


def _moment_means(checkpoint: Path, rule: FlipRule, step: int) -> dict[str, float]:
    """Return means over all binary weights, read one by one; empty if there are no moments."""
    names, sums = checkpoint_tensors.contents(checkpoint), defaultdict[str, float](float)
    for name in names:
        first = f"{OPTIM}exp_avg.{name.removeprefix(BITS)}"
        second = first if rule.sigma is None else first.replace("exp_avg", "exp_avg_sq", 1)
        if not name.startswith(BITS) or first not in names or second not in names:
            continue
        tensors = checkpoint_tensors.read(checkpoint, *{first, second})
        exp_avg, exp_avg_sq = tensors[first].numpy(), tensors[second].numpy()
        ratio = rule.ratio(exp_avg, exp_avg_sq, step)
        sums["weights"] += exp_avg.size
        sums["square"] += (ratio.astype("float64") ** 2).sum()
        sums["inside"] += (abs(ratio) <= rule.threshold(step - 1)).sum()
        sums["silent"] += (exp_avg == 0).sum()
        if rule.sigma is not None:
            usual = rule.gamma(step - 1) * exp_avg_sq**0.5
            sums["still"] += ((usual < HALF_ULP * abs(exp_avg)) & (exp_avg != 0)).sum()
    return {name: float(total) / sums["weights"] for name, total in sums.items()}
