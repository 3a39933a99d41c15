"""`bitfleet advise`: what the hyperparameters of a run do, before and after it."""

import dataclasses
from collections.abc import Sequence

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import MaybeCount, parse_with_run
from bitfleet.trainer.run.user_paths import users_path


@dataclasses.dataclass(frozen=True)
class Advise:
    """Predict the effect of a run's hyperparameters: flips, memory, batch size, fp32, schedules.

    For a run folder, also print what its metrics and its newest checkpoint measured. Options of
    `bitfleet train` (--section.field value) may follow NAME.

    Each line has a verdict: ok; look: unusual, is it intended?; wrong: this cannot work. The exit
    code is 0 whatever the verdicts are: nobody has seen these gradients yet. Bad input: 2.
    """

    run: Positional[str] = ""
    """NAME of a configuration (--config NAME is the same), or the folder of a run."""
    images: MaybeCount = None
    """Training images. Default: those of data.root if it is on this machine, else as published."""


def advise(arguments: Sequence[str]) -> None:
    """Print the advice that `arguments` ask for.

    Raises:
        ValueError: bad input.
        SystemExit: after --help.
    """
    options, rest = parse_with_run(Advise, arguments or ["--help"], "bitfleet advise")
    if options.run and (folder := users_path(options.run)).is_dir():
        if rest:
            raise ValueError(f"{options.run} is a run, which has its configuration: leave out {rest[0]}")
        from bitfleet.launch.advise.advice import advise_run

        print(advise_run(folder, options.images))
        return
    if "/" in options.run:
        raise ValueError(f"there is no run folder {users_path(options.run)}")

    from bitfleet.launch.advise.advice import advise_config
    from bitfleet.launch.parsing.arguments import parse_train

    config = parse_train(["--config", options.run, *rest] if options.run else rest, "bitfleet advise")
    print(advise_config(config, options.images))
