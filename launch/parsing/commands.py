"""Parse the options of a command: they are the fields of a dataclass, and its docstrings are the
help."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Annotated, Any, cast

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from bitfleet.launch.job import is_main_rank
from bitfleet.trainer.run.user_paths import with_users_paths

CONFIG = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)


def _number(kind: Callable[[str], float], metavar: str, *, zero: bool = False) -> Any:
    def read(words: list[str]) -> float:
        try:
            number = kind(words[0])
        except ValueError:
            number = -1
        if not (0 < number < float("inf") or (zero and number == 0)):
            raise ValueError(f"must be a positive number{' or 0' * zero}, not {words[0]!r}")
        return number

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


Count = Annotated[int, _number(int, "N")]
"""Positive whole number."""
MaybeCount = Annotated[int | None, _number(int, "N")]
"""Positive whole number, or None if it is not given."""
MaybeCountOrZero = Annotated[int | None, _number(int, "N", zero=True)]
"""Whole number of at least 0, or None if it is not given."""
MaybeDecimal = Annotated[float | None, _number(float, "X")]
"""Positive number, or None if it is not given."""


def parse(command: Any, arguments: Sequence[str], prog: str) -> Any:
    """Return the options of a command as an instance of `command`.

    Args:
        command: a dataclass; of several commands the union, each chosen by its name in lower case.
        arguments: the words after `prog`.
        prog: how the command was called, as "bitfleet report".

    Raises:
        ValueError: an unknown option (the nearest is named), a missing one, or a value that does
            not fit.
        SystemExit: after --help.
    """
    with one_sentence(prog):
        return with_users_paths(_cli(command, arguments, prog, return_unknown_args=False))


def parse_with_run(command: Any, arguments: Sequence[str], prog: str) -> tuple[Any, list[str]]:
    """Return the options of a command that also takes those of a run, and the words that are not
    options of the command.

    Raises:
        ValueError: an option is missing, or a value does not fit.
        SystemExit: after --help.
    """
    with one_sentence(prog):
        options, rest = _cli(command, arguments, prog, return_unknown_args=True)
    return with_users_paths(options), list(rest)


def _cli(command: Any, arguments: Sequence[str], prog: str, *, return_unknown_args: bool) -> Any:
    # Typed as tyro's overloads for each kind of command would have it.
    cli = cast(Callable[..., Any], tyro.cli)
    return cli(
        command,
        prog=prog,
        args=arguments,
        config=CONFIG,
        use_underscores=True,
        console_outputs=is_main_rank(),
        return_unknown_args=return_unknown_args,
    )


@contextmanager
def one_sentence(prog: str) -> Iterator[None]:
    """Turn the box that tyro draws around an error into a ValueError."""
    drawn = io.StringIO()
    try:
        with redirect_stderr(drawn):
            yield
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise ValueError(_sentence(drawn.getvalue(), prog)) from None


def _sentence(box: str, prog: str) -> str:
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith("╰")]
    # Without UTF-8 tyro draws no frame, and rules under the title and between parts.
    inside = "\n".join(lines[1:] if box.startswith("╭") else lines[2:])
    first, *others = [" ".join(part.split()) for part in re.split(r"^[─-]+$", inside, flags=re.MULTILINE)]
    if not first:
        return f"the command line cannot be read; {prog} --help lists the options"
    if found := re.match(r"Unrecognized (?:or misplaced )?options: ([^ ,]+)", first):
        near = next((m[1] for part in others if (m := re.match(r"Perhaps you meant: (\S+)", part))), None)
        commands = next((m[1] for part in others if (m := re.match(r"Available subcommands: (.+)", part))), None)
        name = found[1].split("=")[0]
        if name.startswith("-"):
            return f"{prog} has no option {name}" + (f"; did you mean {near}?" if near else f"; see {prog} --help")
        if commands and not near:
            return f"there is no command {name!r} of {prog}; there are: {commands}"
        return f"{prog} does not take {name!r}; see {prog} --help"
    return f"{first.rstrip('.')}; see {prog} --help"
