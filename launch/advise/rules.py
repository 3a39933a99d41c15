"""Check the hyperparameters of the update rule by name, and its flips if they are predicted."""

import math

from bitfleet.launch.advise.outlook import Gradient, Line, Outlook, Verdict
from bitfleet.launch.advise.theory import FlipRule, Snapshot, outlived_step, settled_step
from bitfleet.launch.text import rough_percent
from bitfleet.optim import Schedule
from bitfleet.optim.kernels.kernels import EPS

HALF_ULP = 2.0**-24  # relative size below which fp32 does not notice an addend
SMALLEST_NORMAL = 2.0**-126
AVERAGES = ("gamma", "alpha")  # rates of moving averages of the gradient


def rule_lines(outlook: Outlook) -> list[Line]:
    """Return the lines about the rule of the binary weights."""
    rule, names = outlook.rule, [name for name in AVERAGES if getattr(outlook.config.optim, name) is not None]
    averages = [_memory_line(outlook, name) for name in names]
    if rule is None:
        return [Line("flips", "unknown", "ok", "no prediction for this rule"), *averages, *_batch_lines(outlook)]
    lines = [_gradient_line(rule, outlook.gradient)] if outlook.gradient else []
    lines += [*_flip_lines(outlook, rule), *_threshold_lines(outlook, rule), *averages]
    if rule.sigma is not None:
        lines.append(_second_moment_line(outlook, rule, rule.sigma))
    return [*lines, *_batch_lines(outlook), *_float_lines(outlook, rule)]


def _gradient_line(rule: FlipRule, gradient: Gradient) -> Line:
    smallest, largest = min(gradient.layers.values()), max(gradient.layers.values())
    scale = "r has their scale" if rule.sigma is None else "r does not depend on them, but for epsilon"
    reason = f"{gradient.origin}; layers from {smallest:.1e} to {largest:.1e}; {scale}"
    return Line("gradient, rms", f"{gradient.rms:.1e}", "ok" if smallest > 0 else "look", reason)


def _flip_lines(outlook: Outlook, rule: FlipRule) -> list[Line]:
    usual, snapshots = {outlook.middle, outlook.num_steps}, outlook.snapshots
    first = _first_flip_line(outlook, rule, snapshots[1])
    if outlook.config.init is not None and outlook.config.optim.init_inertia > 0:
        reason = f"the state is seeded so that weights of {outlook.config.init} keep their signs (optim.init_inertia)"
        first = Line(first.quantity, "under 1 %", "ok", reason)
    elif outlook.config.model.initial_weights == "signs":  # else the first steps are not predicted
        usual |= {2, 10, 100, 1000, 10_000}
    return [first, *(_flip_line(outlook, snapshot) for step, snapshot in snapshots.items() if step in usual)]


def _first_flip_line(outlook: Outlook, rule: FlipRule, snapshot: Snapshot) -> Line:
    title, init, flips = "flips at step 1", outlook.config.init, snapshot.flip_ratio
    reason = f"|r| is {snapshot.ratio_rms:.2g} (rms), the threshold {snapshot.threshold:g}"
    if rule.sigma is None and outlook.gradient is None:
        return Line(title, "unknown", "look", "r has the scale of the gradient, which was not measured")
    if rule.sigma is None or snapshot.ratio_rms <= snapshot.threshold:
        return Line(title, rough_percent(flips), "ok" if flips > 0.001 else "look", reason)
    reason += ": all weights with their gradient's sign flip, as |r| is the same for all"
    if init is not None:
        reason += f"; what {init} has learned is lost: leave optim.init_inertia at its default"
    elif outlook.config.model.initial_weights == "real":
        reason += "; the next steps flip fewer than in a run that starts from signs"
    return Line(title, "50 %", "ok" if init is None else "wrong", reason)


def _flip_line(outlook: Outlook, snapshot: Snapshot) -> Line:
    step, flips = snapshot.step, snapshot.flip_ratio
    name = {outlook.middle: " (middle)", outlook.num_steps: " (end)"}.get(step, "")
    verdict: Verdict = "look"
    if flips == 0.0 and step == outlook.middle:
        verdict, remark = "wrong", "; no weight flips any more: lower the threshold or raise gamma"
    elif flips == 0.0:
        remark = "; no weight flips: is this intended?"
    elif flips > 0.1 and step >= 100:
        remark = ": weights follow single batches; a smaller gamma averages more of them"
    elif flips > 0.01 and step == outlook.num_steps:
        remark = ": the weights do not come to rest: let gamma end lower"
    else:
        verdict, remark = "ok", ""
    reason = f"{rough_percent(snapshot.free_flip_ratio)} at threshold 0{remark}"
    return Line(f"flips at step {step:,}{name}", rough_percent(flips), verdict, reason)


def _threshold_lines(outlook: Outlook, rule: FlipRule) -> list[Line]:
    """Say how much of the noise the threshold holds back at three steps."""
    lines = []
    for step, point in outlook.points.items():
        snapshot = outlook.snapshots[step]
        verdict, reason = _threshold_verdict(snapshot, is_end=point == "end")
        if rule.sigma is not None and rule.correction == "none":
            reason += f"; the floor of settled noise is {math.sqrt(snapshot.gamma / (2 - snapshot.gamma)):.1e}"
        value = f"{snapshot.threshold:.1e} / {snapshot.ratio_rms:.1e}, {rough_percent(snapshot.dead_band)} in between"
        lines.append(Line(f"threshold against r, {point}", value, verdict, reason))
    return lines


def _threshold_verdict(snapshot: Snapshot, *, is_end: bool) -> tuple[Verdict, str]:
    band, free = snapshot.dead_band, snapshot.free_flip_ratio
    if free == 0.0:
        return "ok", f"gamma is {snapshot.gamma:g} there: m and the weights stand still"
    if band > 0.99:
        return "look" if is_end else "wrong", "r does not exceed the threshold, so nothing flips: lower the threshold"
    if band > 0.5:
        return "look", "the threshold holds most weights"
    if band >= 0.01:
        return "ok", "the threshold matters: it holds these weights"
    if snapshot.flip_ratio > 0.9 * free:
        return "ok", "w is -sign(m): threshold and second moment hardly matter here"
    saved = f"the threshold saves {1 - snapshot.flip_ratio / free:.0%} of the flips back and forth around 0"
    return "ok", f"w is -sign(m) for all but a few weights; as one step moves r by {snapshot.move:.0e}, {saved}"


def _memory_line(outlook: Outlook, name: str) -> Line:
    """Compare the memory of the average whose rate is `name` with the run."""
    rate, last = outlook.schedule(name), outlook.num_steps
    start = 1 / rate(0) if rate(0) else math.inf
    images, epochs = start * outlook.config.global_batch_size, start / outlook.steps_per_epoch
    reason = f"{images:,.3g} images ({epochs:,.2g} epochs) at the start; "
    outlived = outlived_step(rate, last)
    if outlived is None:
        reason += "to the end shorter than the rest of the run"
    elif outlived == 1:
        reason += "longer than the run: the average is a sum of all gradients, and forgets none"
    else:
        reason += f"longer than the rest of the run from step {outlived:,} ({outlived / last:.0%}) on: the weights set"
    verdict: Verdict = "ok" if outlived is None or outlived > 0.3 * last else "look"
    return Line(f"memory 1/{name}", _reach(rate, last), verdict, reason)


def _reach(rate: Schedule, num_steps: int) -> str:
    """Return 1/rate at the first and the last step."""
    steps = [1 / max(rate(step), 1e-300) for step in (0, num_steps - 1)]
    first, last = ["endless" if n > 1e299 else f"{n:,.0f}" if n < 1e8 else f"{n:.0e}" for n in steps]
    return f"{first} steps" if first == last else f"{first} -> {last} steps"


def _second_moment_line(outlook: Outlook, rule: FlipRule, sigma: Schedule) -> Line:
    last, settled = outlook.num_steps, settled_step(sigma, outlook.num_steps)
    effect = {
        "none": "until then r is larger than its floor, as v is too small",
        "as_coded": "v is divided by sigma, not by its missing part",
        "adam": f"the correction makes up for it{'' if sigma.kind == 'constant' else ' in part, as sigma changes'}",
    }[rule.correction]
    when = f"from step {settled:,} on ({settled / last:.0%} of the run)" if settled else "not within the run"
    verdict: Verdict = "ok" if settled and settled < 0.5 * last else "look"
    return Line("memory 1/sigma", _reach(sigma, last), verdict, f"v settles {when}: {effect}")


def _batch_lines(outlook: Outlook) -> list[Line]:
    """Return the settings that keep the effect of a run at twice the batch, half of the steps."""
    optim = outlook.config.optim
    averages = [name for name in (*AVERAGES, "sigma") if getattr(optim, name) is not None]
    names = averages or ["latent_lr"] * (optim.latent_lr is not None)
    schedules = [outlook.schedule(name) for name in names]
    doubled = [f"{name} {2 * each(each.top_step):.3g}" for name, each in zip(names, schedules, strict=True)]
    if optim.rho is not None:  # acts in each step
        doubled.append(f"rho {2 * optim.rho:.3g}")
    effect = "averages span as many images" if averages else "latent weights get as far (Adam on noise: 0.7 of it)"
    return [Line("at twice the batch", ", ".join(doubled), "ok", f"at the start: {effect}")] if doubled else []


def _float_lines(outlook: Outlook, rule: FlipRule) -> list[Line]:
    """Say whether fp32 keeps what the rule adds up."""
    end, middle = outlook.snapshots[outlook.num_steps], outlook.snapshots[outlook.middle]
    shares = {"m": [snapshot.gamma / (snapshot.exp_avg_rms or 1.0) for snapshot in (end, middle)]}
    if rule.sigma is not None:
        shares["v"] = [snapshot.sigma / (snapshot.second_moment or 1.0) for snapshot in (end, middle)]
    lines = [_absorbed_line(moment, *share) for moment, share in shares.items()]
    if rule.sigma is None:
        return lines
    rounding, sigma = HALF_ULP * end.ratio_rms, rule.sigma(0)
    verdict: Verdict = "look" if 0 < end.threshold < rounding else "ok"
    reason = f"at the end; it acts as 0 below the rounding of r near 0, {rounding:.0e}"
    lines.append(Line("fp32: threshold", f"{end.threshold:.1e}", verdict, reason))
    if sigma == 0.0:
        reason = "sigma is 0 at step 1: v stays 0, and r is m / 1e-10, until it rises; let it start above 0"
        return [*lines, Line("fp32: small gradients", "any g", "look", reason)]
    epsilon_limit = 10 * EPS / (math.sqrt(sigma) if rule.correction == "none" else 1.0)
    underflow_limit = math.sqrt(SMALLEST_NORMAL / sigma)
    smallest = min(outlook.gradient.layers.values()) if outlook.gradient else math.inf
    verdict = "wrong" if smallest < underflow_limit else "look" if smallest < epsilon_limit else "ok"
    reason = f"epsilon is over a tenth of sqrt(v) at step 1; v underflows below {underflow_limit:.0e}"
    if verdict != "ok":
        reason += f"; a layer has gradients of {smallest:.0e}: scale the loss up"
    return [*lines, Line("fp32: small gradients", f"|g| < {epsilon_limit:.0e}", verdict, reason)]


def _absorbed_line(moment: str, at_end: float, in_middle: float) -> Line:
    verdict: Verdict = "ok" if at_end >= 16 * HALF_ULP else "look"
    if in_middle < HALF_ULP:
        verdict = "wrong"
        reason = f"{in_middle:.0e} in the middle of the run, below what fp32 notices (6e-08): {moment} stands still"
    elif at_end < HALF_ULP:
        reason = f"below what fp32 notices (6e-08): {moment} stands still by then"
    else:
        reason = f"{math.log2(at_end / HALF_ULP):.0f} bits above what fp32 does not notice (6e-08)"
    return Line(f"fp32: {moment} at the end", f"{at_end:.0e} of {moment} a step", verdict, reason)
