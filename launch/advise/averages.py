"""Advice on the rules that take the sign of an average of averages: two_ema and diode."""

import numpy as np

from bitfleet.launch.advise.flips import percent
from bitfleet.launch.advise.memory import memory_line, values_of
from bitfleet.launch.advise.outlook import Line, Outlook, Verdict
from bitfleet.optim.rules.diode import FIRST_LIMIT

SMALL_GAMMA = 1e-3
"""A tenth of the smallest that is usual as a momentum; Bop2ndOrder's begin below it."""


def two_ema_lines(outlook: Outlook) -> list[Line]:
    """Both memories, and whether gamma is one of this rule."""
    gamma, alpha = outlook.schedule("gamma"), outlook.schedule("alpha")
    first = gamma(0)
    verdict: Verdict = "ok" if first >= SMALL_GAMMA else "look"
    why = (
        "of the size of a momentum"
        if verdict == "ok"
        else "of the size of Bop2ndOrder's gamma, which is another one: here 1 - gamma is a momentum, and gamma is usually 0.1"
    )
    return [
        Line("size of gamma", f"{first:.3g}", verdict, why),
        memory_line("gamma", gamma, outlook, "u is a sum of all gradients, and the first are never forgotten"),
        memory_line(
            "alpha", alpha, outlook, "h is a sum of all that came, and the first gradients are never forgotten"
        ),
    ]


def diode_lines(outlook: Outlook) -> list[Line]:
    """Both memories, and which weights can leave their first sign."""
    return [
        memory_line("gamma", outlook.schedule("gamma"), outlook, "e1 is a sum of all gradients"),
        memory_line("alpha", outlook.schedule("alpha"), outlook, "e2 is a sum of all signs, and keeps its first value"),
        _reach_line(outlook),
    ]


def _reach_line(outlook: Outlook) -> Line:
    """Where all gradients agree, e2 decays from its first value and is pulled to the other side. It has crossed 0 by a step if it
    began below the sum of alpha latent_lr / (what is left of the first value)."""
    rates, stride = values_of(outlook.schedule("alpha"), outlook.num_steps)
    pulls, _ = values_of(outlook.schedule("latent_lr"), outlook.num_steps)
    with np.errstate(divide="ignore"):
        logs = np.log1p(-rates) * stride
    reached = np.cumsum(pulls * -np.expm1(logs) * np.exp(np.minimum(-np.cumsum(logs), 700.0)))
    share = min(1.0, float(reached[-1]) / FIRST_LIMIT)
    half = np.flatnonzero(reached >= 0.5 * FIRST_LIMIT)
    value = f"{percent(share)} of the weights"
    origin = f"|e2| begins between 0 and {FIRST_LIMIT:g}, latent_lr is {pulls[0]:.3g}"
    if len(half):
        why = f"{origin}: where gradients agree, half of the weights can have flipped by step {half[0] * stride + 1:,}"
        return Line("can flip in the run", value, "ok" if half[0] * stride < 0.5 * outlook.num_steps else "look", why)
    why = f"{origin}: the others keep their first sign even where all gradients agree; raise alpha or latent_lr"
    return Line("can flip in the run", value, "look" if share > 0.01 else "wrong", why)
