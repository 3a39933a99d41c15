"""Runs, one a file: a header (paper, machine, hours, expected accuracy, command) and `config() ->
TrainConfig`."""

import difflib
import importlib
from pathlib import Path

from bitfleet.trainer.config import TrainConfig


def available() -> list[str]:
    """Return the names of all configurations."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def load_config(name: str) -> TrainConfig:
    """Return the configuration called `name`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    names = available()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no configuration {name!r}; did you mean {near!r}? There are: {', '.join(names)}")
    config: TrainConfig = importlib.import_module(f"bitfleet.configs.{name}").config()
    return config
