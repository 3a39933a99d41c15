"""What another batch size asks of a rule; that of the two Bops is a line of advice_flips.py, the memory in images."""

from bitfleet.launch.advise.outlook import Line, Outlook

MEMORIES: dict[str, tuple[str, ...]] = {"two_ema": ("gamma", "alpha"), "diode": ("gamma", "alpha")}
"""Rates of averages, which are to reach as many images back."""
ADAMS = ("latent_adam", "bnew")
"""A step is latent_lr long, whatever the gradient: half of the steps go half as far where gradients agree, 0.7 on noise."""
SUMS = ("latent_sgd", "sgdat")
"""A step is latent_lr times the gradient, whose noise falls with the root of the batch: half as far in either case."""


def batch_lines(outlook: Outlook) -> list[Line]:
    """Settings that keep what the run does at twice the batch, in half of the steps; none for the two Bops."""
    rule, title = outlook.config.optim.rule, "at twice the batch"
    if rule in MEMORIES:
        rates = {name: outlook.schedule(name)(0) for name in MEMORIES[rule]}
        value = ", ".join(f"{name} {min(1.0, 2 * rate):.3g}" for name, rate in rates.items())
        return [
            Line(title, value, "ok", "at the start: the memories then reach as many images back, in half of the steps")
        ]
    if rule not in (*ADAMS, *SUMS):
        return []
    latent_lr = outlook.schedule("latent_lr")(0)
    value = f"latent_lr {2 * latent_lr:.3g}"
    why = "at the start: the latent weights then get as far in half of the steps"
    if rule in SUMS:
        return [
            Line(
                title,
                value,
                "ok",
                f"{why}, whether gradients agree or are noise, which falls with the root of the batch",
            )
        ]
    why += f" where gradients agree; on noise it is {2**0.5 * latent_lr:.3g}"
    if (rho := outlook.config.optim.rho) is not None:  # bnew's weights also grow by it in each step
        value += f", rho {2 * rho:.3g}"
    return [Line(title, value, "ok", why)]
