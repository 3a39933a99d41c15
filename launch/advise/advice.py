"""Advice on a run before it is made: what its hyperparameters do, and whether that can be meant. Arithmetic, no training.

Each rule of the binary weights has its own advice in `ADVICE`; what concerns every run is here.
"""

import dataclasses
from collections.abc import Callable

from bitfleet.launch.advise.averages import diode_lines, two_ema_lines
from bitfleet.launch.advise.batch import batch_lines
from bitfleet.launch.advise.flips import flip_lines
from bitfleet.launch.advise.latent import bnew_lines, latent_adam_lines, latent_sgd_lines, sgdat_lines
from bitfleet.launch.advise.outlook import Line, Outlook, Verdict
from bitfleet.optim import Schedule

ADVICE: dict[str, Callable[[Outlook], list[Line]]] = {
    "bop2ndorder": flip_lines,
    "bop": flip_lines,
    "latent_adam": latent_adam_lines,
    "latent_sgd": latent_sgd_lines,
    "two_ema": two_ema_lines,
    "sgdat": sgdat_lines,
    "diode": diode_lines,
    "bnew": bnew_lines,
}
"""Rule of the binary weights -> the lines about it."""


def advise(outlook: Outlook) -> list[Line]:
    """The lines about a run before it is made."""
    lines = ADVICE[outlook.config.optim.rule](outlook) + batch_lines(outlook) + schedule_lines(outlook)
    return lines if outlook.driven is None else _as_beginning(lines, outlook)


def _as_beginning(lines: list[Line], outlook: Outlook) -> list[Line]:
    """`lines` of a run of which a controller drives a hyperparameter: what they call wrong it may put right."""
    name, target = outlook.driven, outlook.config.optim.transitions.target.over(outlook.decay_steps)
    why = (
        f"optim.transitions moves it from there so that the flips follow a target, {target(0):.3g} -> "
        f"{target(outlook.num_steps - 1):.3g} of the weights a step; what follows is for its beginning"
    )
    first = Line(f"{name} is driven", f"from {outlook.schedule(str(name))(0):.3g}", "look", why)
    return [first, *(line._replace(verdict="look") if line.verdict == "wrong" else line for line in lines)]


def schedule_lines(outlook: Outlook) -> list[Line]:
    """Where each schedule of the configuration ends, and whether the run gets there."""
    optim = outlook.config.optim
    fields = [field.name for field in dataclasses.fields(optim) if isinstance(getattr(optim, field.name), Schedule)]
    return [_schedule_line(name, getattr(optim, name), outlook) for name in fields]


def _schedule_line(name: str, schedule: Schedule, outlook: Outlook) -> Line:
    if name == outlook.driven:
        return Line(f"schedule of {name}", f"{schedule(0):.3g}", "ok", "driven from here")
    filled, last = schedule.over(outlook.decay_steps), outlook.num_steps
    length = filled.num_steps or last
    value = f"{filled(0):.3g} -> {filled(last - 1):.3g}"
    title = f"schedule of {name}"
    if schedule.kind == "constant":
        if schedule.end != 0.0:
            return Line(title, value, "look", f"constant: its end, {schedule.end:g}, is used by other kinds only")
        return Line(title, value, "ok", "constant")
    if schedule.kind == "exponential":
        count = (last - 1) // length
        verdict: Verdict = "ok" if count else "look"
        return Line(title, value, verdict, f"{count} stairs of {length:,} steps x {schedule.rate:g} within the run")
    if length < 0.9 * last:
        why = f"it is at its end {filled.end:g} from step {length:,} of {last:,} on: is the run meant to be longer than it?"
        return Line(title, value, "look", why)
    if length > 1.1 * last:
        why = f"it would end at {filled.end:g} after {length:,} steps, but the run has {last:,}"
        return Line(title, value, "look", why)
    short = length - last + 1
    if short <= 0:
        return Line(title, value, "ok", f"it reaches its end, {filled.end:g}")
    return Line(title, value, "ok", f"the last step is {short:,} before its end, {filled.end:g}")
