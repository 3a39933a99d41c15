"""`bitfleet checkpoint`: look at checkpoints, compare them, and write the model alone."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import parse


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Print position, files, hashes, tensors, metrics, versions and config of a checkpoint."""

    path: Positional[Path]
    """Checkpoint (RUN/checkpoints/step-00001234), or run folder: its newest checkpoint."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Read every file of a checkpoint again and compare it with its hash."""

    path: Positional[Path]
    """Checkpoint or run folder."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Write the model alone; binary weights as +-1 in fp32."""

    path: Positional[Path]
    """Checkpoint or run folder."""
    output: Positional[Path]
    """File to write, .safetensors."""
    packed: bool = False
    """Write binary weights as bits, 8 per byte."""


@dataclasses.dataclass(frozen=True)
class Diff:
    """Print the first element in which two checkpoints differ; exit code 1 if there is one."""

    a: Positional[Path]
    """Checkpoint or run folder."""
    b: Positional[Path]
    """Checkpoint or run folder."""


def checkpoint(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` name.

    Raises:
        ValueError: bad input, or a damaged checkpoint.
        SystemExit: 1, when two checkpoints differ.
    """
    options = parse(Inspect | Verify | Weights | Diff, arguments, "bitfleet checkpoint")
    from bitfleet.launch.checkpoint import tools

    match options:
        case Inspect():
            print(tools.inspect(options.path))
        case Verify():
            print(tools.verified(options.path))
        case Weights():
            print(tools.export_weights(options.path, options.output, packed=options.packed))
        case Diff():
            difference = tools.first_difference(options.a, options.b)
            print(difference or "every tensor has the same bits")
            sys.exit(bool(difference))
