"""Sweeps, one per file: a header (section of the paper, question, its settings) and `sweep()`."""

import difflib
import importlib
from pathlib import Path

from bitfleet.configs.sweeps.sweep import Sweep


def available_sweeps() -> list[str]:
    """Return the names of all sweeps."""
    return sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "sweep", "entry")
    )


def load_sweep(name: str) -> Sweep:
    """Return the sweep called `name`.

    Raises:
        ValueError: there is no such sweep; the message names the nearest.
    """
    names = available_sweeps()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no sweep {name!r}; did you mean {near!r}? There are: {', '.join(names)}")
    sweep: Sweep = importlib.import_module(f"bitfleet.configs.sweeps.{name}").sweep()
    return sweep
