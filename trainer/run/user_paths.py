"""Expand a leading ~ in every path that a user gives."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")
TEXTS = ("root", "resume", "data_root")
"""Fields that hold a path as text, since they can also hold a word."""


def users_path(text: str | Path) -> Path:
    """Return `text` as a path, with the home folder in place of a leading ~ or ~name.

    Raises:
        ValueError: that home folder is unknown.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"the path {text} begins with the home folder of a user who has none here: write the path in full"
        ) from None


def with_users_paths(config: Config) -> Config:
    """Return the dataclass `config` with `users_path` of every path in it and in its parts.

    Raises:
        ValueError: a home folder is unknown.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            new: Any = with_users_paths(value)
        elif isinstance(value, Path):
            new = users_path(value)
        elif isinstance(value, tuple) and any(isinstance(each, Path) for each in value):
            new = tuple(map(users_path, value))
        elif isinstance(value, str) and field.name in TEXTS and value.startswith("~"):
            new = str(users_path(value))
        else:
            continue
        if new != value:
            changed[field.name] = new
    return dataclasses.replace(config, **changed) if changed else config  # type: ignore[type-var]
