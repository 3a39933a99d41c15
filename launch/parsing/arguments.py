"""From a command line to a `TrainConfig`: `--config NAME` and typed overrides."""

import dataclasses
import difflib
import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, get_args

import tyro

from bitfleet.configs import available, load_config
from bitfleet.launch.job import is_first_rank
from bitfleet.launch.parsing.options import take_option
from bitfleet.optim import with_rule
from bitfleet.optim.config import check_belongs
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.run.user_paths import with_users_paths

DEFAULT_HELP = "fashion_quickstart"
RULE = "--optim.rule"


def parse_train(arguments: Sequence[str], prog: str) -> TrainConfig:
    """The run that `arguments` ask for.

    Raises:
        ValueError: unknown configuration or option (the nearest is named), or a value that does not fit.
        SystemExit: after --help.
    """
    name, rest = take_option([a for a in arguments if not a.startswith("--local_rank=")], "--config")
    wants_help = "-h" in rest or "--help" in rest
    if name is None:
        if not wants_help:
            raise ValueError(f"which run? Pass --config NAME, one of: {', '.join(available())}")
        name = DEFAULT_HELP
    description = (
        f"Train the run {name!r}; the defaults below are its values. Configurations: {', '.join(available())}."
    )
    return override(load_config(name), rest, prog=f"{prog} --config {name}", description=description)


def override(default: TrainConfig, arguments: Sequence[str], *, prog: str, description: str) -> TrainConfig:
    """`default` with the fields that `arguments` name.

    Raises:
        ValueError: unknown option (the nearest is named), or a value that does not fit.
        SystemExit: after --help.
    """
    rule, _ = take_option(list(arguments), RULE)
    if rule is not None:
        default = dataclasses.replace(default, optim=with_rule(default.optim, rule))
    _reject_unknown(arguments, default)
    with one_sentence():
        config = tyro.cli(
            TrainConfig,
            prog=prog,
            description=description,
            default=default,
            args=arguments,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            console_outputs=is_first_rank(),
        )
    return with_users_paths(config)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn the box that tyro draws around a bad value into a ValueError."""
    drawn = io.StringIO()
    try:
        with redirect_stderr(drawn):
            yield
    except SystemExit as leaving:
        if not leaving.code:
            raise
        inside = [line.strip("│ ").strip() for line in drawn.getvalue().splitlines() if line.startswith("│")]
        sentence = itertools.takewhile(lambda line: not line.startswith("──"), inside)
        raise ValueError(" ".join(sentence) or "the command line cannot be read") from None


def option_names(config: Any, prefix: str = "--") -> list[str]:
    """Every option that overrides a field of the dataclass `config`; parts that are None have none."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += option_names(value, f"{prefix}{field.name}.")
        elif value is not None or not any(map(dataclasses.is_dataclass, get_args(field.type))):
            names.append(prefix + field.name)
    return names


def _reject_unknown(arguments: Sequence[str], config: TrainConfig) -> None:
    known = option_names(config)
    for argument in arguments:
        option = argument.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if argument.startswith("--") and option not in known and argument != "--help":
            if option.startswith("--optim."):
                check_belongs(config.optim.rule, option.split(".")[1])
            near = difflib.get_close_matches(argument.split("=")[0], known, n=1, cutoff=0.0)[0]
            raise ValueError(f"there is no option {argument.split('=')[0]}; did you mean {near}?")
