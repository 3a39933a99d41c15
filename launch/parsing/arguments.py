"""Turn a command line into a `TrainConfig`: `--config NAME` and typed overrides."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

import tyro

from bitfleet.configs import available, load_config
from bitfleet.launch.job import is_main_rank
from bitfleet.launch.parsing.commands import one_sentence, parse_with_run
from bitfleet.optim import with_rule
from bitfleet.optim.config import check_belongs
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.run.user_paths import with_users_paths

DEFAULT_HELP = "fashion_quickstart"
HELP = {"-h", "--help"}


@dataclasses.dataclass(frozen=True)
class _Rule:
    rule: str | None = None


@dataclasses.dataclass(frozen=True)
class _Named:
    """Options that decide the defaults of all others."""

    config: str | None = None
    optim: _Rule = _Rule()


def parse_train(arguments: Sequence[str], prog: str) -> TrainConfig:
    """Return the run that `arguments` ask for.

    Raises:
        ValueError: unknown configuration or option (the nearest is named), or a value that does not
            fit.
        SystemExit: after --help.
    """
    wants_help = bool(HELP & set(arguments))
    named, rest = parse_with_run(_Named, [a for a in arguments if a not in HELP], prog)
    name = named.config or (DEFAULT_HELP if wants_help else None)
    if name is None:
        misspelt = difflib.get_close_matches("--config", [word.split("=")[0] for word in rest], n=1)
        wrong = f"there is no option {misspelt[0]}; " if misspelt else ""
        raise ValueError(f"{wrong}which run? Pass --config NAME, one of: {', '.join(available())}")
    description = (
        f"Train the run {name!r}; the defaults below are its values. Configurations: {', '.join(available())}."
    )
    default, prog = load_config(name), f"{prog} --config {name}"
    if named.optim.rule is not None:
        default = dataclasses.replace(default, optim=with_rule(default.optim, named.optim.rule))
    return override(default, [*rest, *["--help"] * wants_help], prog=prog, description=description)


def override(default: TrainConfig, arguments: Sequence[str], *, prog: str, description: str) -> TrainConfig:
    """Return `default` with the fields that `arguments` name.

    Raises:
        ValueError: unknown option (the nearest is named), or a value that does not fit.
        SystemExit: after --help.
    """
    _reject_unknown(arguments, default)
    with one_sentence(prog):
        config = tyro.cli(
            TrainConfig,
            prog=prog,
            description=description,
            default=default,
            args=arguments,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            console_outputs=is_main_rank(),
        )
    return with_users_paths(config)


def option_names(config: Any, prefix: str = "--") -> list[str]:
    """Return every option that overrides a field of the dataclass `config`; parts that are None
    have none."""
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
        if re.match("--|-[a-z]", argument) and option not in known and argument != "--help":  # -1 is a value
            if option.startswith("--optim."):
                check_belongs(config.optim.rule, option.split(".")[1])
            near = difflib.get_close_matches(argument.split("=")[0], known, n=1, cutoff=0.0)[0]
            raise ValueError(f"there is no option {argument.split('=')[0]}; did you mean {near}?")
