"""Advice on the rules that flip a weight when a ratio passes a threshold: Bop2ndOrder and Bop."""

import math

from bitfleet.launch.advise.memory import memory_line, reach
from bitfleet.launch.advise.outlook import LOOKS, Line, Outlook, Verdict
from bitfleet.launch.advise.theory import Snapshot, first_flip_ratio, first_ratio, noise_floor, settled_step
from bitfleet.optim.kernels.kernels import EPS

HALF_ULP = 2.0**-24
"""Relative size below which fp32 does not notice what is added."""
SMALLEST_NORMAL = 2.0**-126
RECIPES = {
    "xnornet": (1024, 1e-4, "ImageNet"),
    "birealnet18": (1024, 1e-4, "ImageNet"),
    "binarynet": (50, 1e-2, "CIFAR-10"),
}
"""Network -> batch and first gamma of the paper's run."""


def flip_lines(outlook: Outlook) -> list[Line]:
    """All lines about such a rule."""
    lines = [*gradient_lines(outlook), first_step_line(outlook), *ratio_lines(outlook), *regime_lines(outlook)]
    lines += [*memory_lines(outlook), batch_line(outlook), *float_lines(outlook)]
    return lines


def gradient_lines(outlook: Outlook) -> list[Line]:
    """How large the gradients are, if that was measured."""
    gradient = outlook.gradient
    if gradient is None:
        return []
    why = (
        f"one backward pass on {gradient.num_images} images {gradient.images}, taken to a batch of "
        f"{outlook.config.global_batch_size:,} as noise; layers from {gradient.smallest_rms:.1e} ({gradient.smallest_layer}) "
        f"to {gradient.largest_rms:.1e} ({gradient.largest_layer})"
    )
    scale = (
        "the rule has their scale" if outlook.rule.sigma is None else "the ratio does not depend on it, but for epsilon"
    )
    verdict: Verdict = "ok" if gradient.smallest_rms > 0 else "look"
    return [Line("gradient, rms", f"{gradient.rms:.1e}", verdict, f"{why}; {scale}")]


def first_step_line(outlook: Outlook) -> Line:
    """What happens at step 1, when both moments begin at 0; or were seeded, in a run from weights."""
    rule, gradient = outlook.rule, outlook.gradient
    threshold = rule.threshold(0)
    title = "flips at step 1"
    if outlook.is_seeded:
        why = f"the state is seeded so that the weights of {outlook.config.init} keep their signs (optim.init_inertia)"
        return Line(title, "under 1 %", "ok", why)
    if rule.sigma is None:
        if gradient is None:
            return Line(
                title, "unknown", "look", "Bop's threshold has the scale of the gradient, which was not measured"
            )
        share = first_flip_ratio(rule, gradient.rms)
        value = percent(share)
        why = f"m is gamma g there: {rule.gamma(0) * gradient.rms:.1e} (rms) against the threshold {threshold:g}"
        return Line(title, value, "ok" if share > 0.001 else "look", why)
    ratio = first_ratio(rule, gradient.rms if gradient else 1.0)
    origin = "gamma / sqrt(sigma)" if rule.correction == "none" else f"1 under the correction {rule.correction!r}"
    if ratio > threshold:
        why = (
            f"|r| is {ratio:.2g} for every weight ({origin}), over the threshold {threshold:g}: all that have their gradient's "
            "sign flip"
        )
        if outlook.config.init is not None:
            why += f", and what {outlook.config.init} has learned is lost: leave optim.init_inertia at its default"
            return Line(title, "50 %", "wrong", why)
        if outlook.config.model.initial_weights == "real":
            why += "; the next steps flip fewer than in a run that starts from signs"
        return Line(title, "50 %", "ok", why)
    why = f"|r| is {ratio:.2g} for every weight ({origin}), under the threshold {threshold:g}: none can flip yet"
    return Line(title, "0 %", "look", why)


def ratio_lines(outlook: Outlook) -> list[Line]:
    """The flip ratio over the run, on gradients that are noise."""
    # The first steps depend on what is seeded, or on how much larger the first gradient, of real weights, was.
    is_known = not outlook.is_seeded and outlook.config.model.initial_weights == "signs"
    usual = (*(LOOKS[1:] if is_known else ()), outlook.middle, outlook.num_steps)
    return [_ratio_line(outlook, found) for step, found in outlook.snapshots.items() if step in usual]


def _ratio_line(outlook: Outlook, found: Snapshot) -> Line:
    name = {outlook.middle: " (middle)", outlook.num_steps: " (end)"}.get(found.step, "")
    verdict: Verdict = "ok"
    why = f"of noise; {percent(found.free_flip_ratio)} at threshold 0"
    if found.flip_ratio == 0.0 and found.step == outlook.middle:
        verdict, why = "wrong", f"{why}; no weight flips any more: lower the threshold or raise gamma"
    elif found.flip_ratio == 0.0:
        when = "by then no weight flips any more" if found.step > outlook.middle else "no weight flips there"
        verdict, why = "look", f"{why}; {when}: is it meant?"
    elif found.flip_ratio > 0.1 and found.step >= 100:
        verdict, why = "look", f"{why}: weights follow single batches; a smaller gamma averages more of them"
    elif found.step == outlook.num_steps and found.flip_ratio > 0.01:
        verdict, why = "look", f"{why}: the weights do not come to rest: let gamma end lower"
    return Line(f"flips at step {found.step:,}{name}", percent(found.flip_ratio), verdict, why)


def percent(fraction: float) -> str:
    """A fraction in percent, two digits, powers of ten where it is tiny."""
    if fraction == 0.0:
        return "0 %"
    if fraction >= 0.1:
        return f"{100 * fraction:.0f} %"
    return f"{100 * fraction:.2g} %" if fraction >= 1e-5 else f"{100 * fraction:.0e} %"


def regime_lines(outlook: Outlook) -> list[Line]:
    """Whether the threshold decides anything, at the start, in the middle and at the end."""
    places = {"end": outlook.num_steps, "middle": outlook.middle, "start": outlook.start}
    chosen = {step: name for name, step in places.items()}  # a short run has fewer places
    return [_regime_line(chosen[step], outlook.snapshots[step], outlook) for step in sorted(chosen)]


def _regime_line(place: str, found: Snapshot, outlook: Outlook) -> Line:
    title = f"threshold against r, {place}"
    value = f"{found.threshold:.1e} / {found.ratio_rms:.1e}, {percent(found.dead_band)} in between"
    floor = noise_floor(found.gamma)
    settled = (
        f"; the floor of settled noise is {floor:.1e}"
        if outlook.rule.sigma and outlook.rule.correction == "none"
        else ""
    )
    if found.dead_band > 0.99:
        if place == "end":
            return Line(
                title, value, "look", f"r does not get over the threshold: by then nothing flips any more{settled}"
            )
        why = f"r does not get over the threshold, so nothing flips{settled}: lower the threshold"
        return Line(title, value, "wrong", why)
    if found.dead_band > 0.5:
        return Line(title, value, "look", f"the threshold holds most weights at step {found.step:,}{settled}")
    if found.dead_band >= 0.01:
        return Line(
            title, value, "ok", f"the threshold matters: it holds these weights at step {found.step:,}{settled}"
        )
    if found.free_flip_ratio == 0.0:
        return Line(title, value, "ok", f"gamma is {found.gamma:g} there: m and the weights stand still{settled}")
    kept = found.flip_ratio / found.free_flip_ratio
    if kept > 0.9:
        why = f"w is -sign(m): threshold and second moment hardly matter here{settled}"
        return Line(title, value, "ok", why)
    why = (
        f"w is -sign(m) for all but a few weights; as one step moves r by {found.move:.0e}, the threshold saves {1 - kept:.0%} "
        f"of the flips to and fro around 0{settled}"
    )
    return Line(title, value, "ok", why)


def memory_lines(outlook: Outlook) -> list[Line]:
    """How far back the moments reach, against the length of the run."""
    never = "m is a sum of all gradients, and the first are never forgotten"
    return [memory_line("gamma", outlook.rule.gamma, outlook, never), *_second_moment_lines(outlook)]


def _second_moment_lines(outlook: Outlook) -> list[Line]:
    rule, last = outlook.rule, outlook.num_steps
    if rule.sigma is None:
        return []
    start, end = rule.sigma(0), rule.sigma(last - 1)
    value = reach(start, end)
    settled = settled_step(rule.sigma, last)
    effect = {
        "none": "until then r is larger than its floor, as v is too small",
        "as_coded": "v is divided by sigma, not by what is missing",
        "adam": f"the correction makes up for it{'' if rule.sigma.kind == 'constant' else ' in part, as sigma changes'}",
    }[rule.correction]
    if settled is None:
        return [Line("memory 1/sigma", value, "look", f"v does not settle within the run: {effect}")]
    when = f"{settled / outlook.steps_per_epoch:.2g} epochs, {settled / last:.0%} of the run"
    why = f"v has settled from step {settled:,} on ({when}): {effect}"
    return [Line("memory 1/sigma", value, "ok" if settled < 0.5 * last else "look", why)]


def batch_line(outlook: Outlook) -> Line:
    """The memory in images, which a change of the batch changes."""
    config, gamma = outlook.config, outlook.rule.gamma(0)
    batch = config.global_batch_size
    if gamma == 0.0:
        return Line(
            "memory in images", "endless", "look", "gamma is 0 at the start: the average, and the weights, stand still"
        )
    value = f"{batch / gamma:,.3g} images"
    why = f"at twice the batch the same memory is gamma {min(1.0, 2 * gamma):.3g} at the start, and the run has half the steps"
    if config.model.name not in RECIPES:
        return Line("memory in images", value, "ok", why)
    their_batch, their_gamma, data = RECIPES[config.model.name]
    times = (batch / gamma) / (their_batch / their_gamma)
    fitting = their_gamma * batch / their_batch
    if 0.5 <= times <= 2.0:
        why = f"the paper's on {data}: {their_batch / their_gamma:,.3g} (batch {their_batch}, gamma {their_gamma:g}); {why}"
        return Line("memory in images", value, "ok", why)
    why = (
        f"{times:.2g} x the paper's on {data} (batch {their_batch}, gamma {their_gamma:g}): at batch {batch} the same memory "
        f"is gamma {fitting:.3g}" + (", which no average has" if fitting > 1 else "")
    )
    return Line("memory in images", value, "look", why)


def float_lines(outlook: Outlook) -> list[Line]:
    """Whether fp32 keeps what the rule adds up."""
    end, middle = outlook.snapshots[outlook.num_steps], outlook.snapshots[outlook.middle]
    at_end, in_middle = (found.gamma / (found.exp_avg_rms or 1.0) for found in (end, middle))  # 0 as long as gamma was
    lines = [_absorbed_line("m", at_end, in_middle, outlook.num_steps)]
    if outlook.rule.sigma is None:
        return lines
    at_end, in_middle = (found.sigma / (found.second_moment or 1.0) for found in (end, middle))
    lines.append(_absorbed_line("v", at_end, in_middle, outlook.num_steps))
    noise = HALF_ULP * end.ratio_rms
    if 0 < end.threshold < noise:
        why = f"below the rounding of r near 0, {noise:.0e}: it is a threshold of 0"
        lines.append(Line("fp32: threshold", f"{end.threshold:.1e}", "look", why))
    else:
        lines.append(
            Line("fp32: threshold", f"{end.threshold:.1e}", "ok", f"at the end; rounding of r near 0 is {noise:.0e}")
        )
    if outlook.rule.correction == "adam":
        why = "1 - (1 - rate)^t is taken in fp64 by expm1 and log1p: exact for any rate"
        lines.append(Line("fp32: correction", "fp64", "ok", why))
    return [*lines, *_small_gradient_lines(outlook)]


def _absorbed_line(moment: str, at_end: float, in_middle: float, num_steps: int) -> Line:
    title, value = f"fp32: {moment} at the end", f"{at_end:.0e} of {moment} a step"
    if in_middle < HALF_ULP:
        why = (
            f"in the middle of the run it is {in_middle:.0e}, which fp32 (6e-08) does not notice: {moment} stands still"
        )
        return Line(title, value, "wrong", why)
    if at_end < HALF_ULP:
        return Line(
            title,
            value,
            "look",
            f"fp32 (6e-08) does not notice it at step {num_steps:,}: {moment} stands still by then",
        )
    if at_end < 16 * HALF_ULP:
        return Line(title, value, "look", f"fp32 (6e-08) rounds it to {math.log2(at_end / HALF_ULP):.0f} bits")
    return Line(title, value, "ok", f"{math.log2(at_end / HALF_ULP):.0f} bits above what fp32 (6e-08) does not notice")


def _small_gradient_lines(outlook: Outlook) -> list[Line]:
    """v of the smallest gradients: epsilon beside its root, and underflow."""
    rule, gradient = outlook.rule, outlook.gradient
    assert rule.sigma is not None
    sigma = rule.sigma(0)
    if sigma == 0.0:
        why = "sigma is 0 at step 1: v stays 0, and r is m / 1e-10, until it rises; let it begin above 0"
        return [Line("epsilon 1e-10", "any g", "look", why)]
    least = EPS / math.sqrt(sigma) * (math.sqrt(sigma) if rule.correction != "none" else 1.0)
    underflow = math.sqrt(SMALLEST_NORMAL / sigma)
    lines = []
    for title, limit, verdict, effect in (
        ("epsilon 1e-10", 10 * least, "look", "epsilon is over a tenth of sqrt(v) at step 1, and r smaller for it"),
        ("fp32: v underflows", underflow, "wrong", "sigma g^2 is no normal number at step 1"),
    ):
        value = f"|g| < {limit:.0e}"
        if gradient is None:
            lines.append(Line(title, value, "ok", f"there {effect}; gradients were not measured"))
        elif gradient.smallest_rms < limit:
            bad: Verdict = "wrong" if verdict == "wrong" else "look"
            why = f"{gradient.smallest_layer} has gradients of {gradient.smallest_rms:.0e}, where {effect}: scale the loss up"
            lines.append(Line(title, value, bad, why))
        else:
            lines.append(
                Line(title, value, "ok", f"there {effect}; the smallest layer has {gradient.smallest_rms:.0e}")
            )
    return lines
