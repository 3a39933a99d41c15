"""Options of the small commands, taken from a command line one by one; nothing heavy is imported for them."""

from collections.abc import Sequence


def take_option(arguments: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Remove `option VALUE` or `option=VALUE` from `arguments`; returns (VALUE or None, the rest)."""
    value, rest = None, []
    pending = map(_with_underscores, arguments)
    for argument in pending:
        if argument == option:
            value = next(pending, None)
            if value is None:
                raise ValueError(f"{option} needs a value")
        elif argument.startswith(option + "="):
            value = argument[len(option) + 1 :]
        else:
            rest.append(argument)
    return value, rest


def take_number(arguments: Sequence[str], option: str, default: int) -> tuple[int, list[str]]:
    """Remove `option N` from `arguments`; returns (N or `default`, the rest).

    Raises:
        ValueError: N is not a positive number.
    """
    value, rest = take_option(arguments, option)
    if value is not None and (not value.isdecimal() or int(value) == 0):
        raise ValueError(f"{option} must be a positive number, not {value!r}")
    return int(value or default), rest


def take_flag(arguments: Sequence[str], option: str) -> tuple[bool, list[str]]:
    """Remove `option` from `arguments`; returns (whether it was there, the rest)."""
    given = list(map(_with_underscores, arguments))
    return option in given, [argument for argument in given if argument != option]


def _with_underscores(argument: str) -> str:
    """--short-side is --short_side, as tyro has it; a value keeps its hyphens."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def take_decimal(arguments: Sequence[str], option: str) -> tuple[float | None, list[str]]:
    """Remove `option X` from `arguments`; returns (X or None, the rest).

    Raises:
        ValueError: X is not a positive number.
    """
    value, rest = take_option(arguments, option)
    if value is None:
        return None, rest
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{option} must be a positive number, not {value!r}")
    return number, rest


def take_list(arguments: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """Remove `option VALUE VALUE ...`, up to the next option, from `arguments`; returns (the values, the rest).

    Raises:
        ValueError: the option has no value.
    """
    values: list[str] = []
    rest: list[str] = []
    target = rest
    for argument in arguments:
        if argument.startswith("--"):
            target = values if _with_underscores(argument) == option else rest
            if target is values:
                continue
        target.append(argument)
    if not values and any(_with_underscores(argument) == option for argument in arguments):
        raise ValueError(f"{option} needs a value")
    return values, rest
