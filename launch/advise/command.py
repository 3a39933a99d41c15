"""Advise: `bitfleet advise NAME [--section.field value ...]` before a run, `bitfleet advise RUN` after it."""

from collections.abc import Sequence

from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.parsing.options import take_number, take_option
from bitfleet.trainer.run.user_paths import users_path

USAGE = """usage: bitfleet advise NAME [--section.field value ...]        (or --config NAME)
       bitfleet advise RUN

Say what the hyperparameters of a run will do, before it is made: flips, noise against the threshold, memory, batch size,
fp32, schedules. Of a run folder: the same, and beside it what the run's metrics and its newest checkpoint measured.

  --images N       training images (those of data.root where it is here, else those of ImageNet or CIFAR by the classes)

Each line has a verdict: ok; look: unusual, is it meant?; wrong: this cannot work as it is. The exit code is 0 whatever the
verdicts are: they are advice about gradients that nobody has seen yet, and should not stop a script. It is 2 for bad input."""


def advise(arguments: Sequence[str]) -> None:
    """Print the advice that `arguments` ask for.

    Raises:
        ValueError: bad input.
    """
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return
    number, rest = take_option(arguments, "--images")
    num_images = take_number(["--images", number], "--images", 0)[0] if number is not None else None
    subject = rest[0] if rest and not rest[0].startswith("-") else None
    if subject is not None and (folder := users_path(subject)).is_dir():
        if len(rest) > 1:
            raise ValueError(f"{subject} is a run, which has its configuration: leave out {rest[1]}")
        from bitfleet.launch.advise.run import advise_run

        print(advise_run(folder, num_images))
        return
    if subject is not None:
        if "/" in subject:
            raise ValueError(f"there is no run folder {folder}")
        rest = ["--config", *rest]
    config = parse_train(rest, "bitfleet advise")

    from bitfleet.launch.advise.run import advise_config

    print(advise_config(config, num_images))
