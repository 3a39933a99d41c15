"""`bitfleet export`: write the network of a run for devices."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import MaybeCount, parse_with_run


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the network of a run as a packed program, whose binary weights are bits, and check it.

    `bitfleet run OUTPUT IMAGE...` runs it. A file of weights needs the configuration of its network
    behind it: --config NAME [--section.field value ...].
    """

    source: Positional[Path]
    """Run folder (its newest checkpoint is taken), checkpoint, or a file of weights."""
    output: Positional[Path]
    """File to write."""
    image_size: MaybeCount = None
    """Height and width of the images, pixels. Default: those of the run."""


def export(arguments: Sequence[str]) -> None:
    """Write the file that `arguments` name.

    Raises:
        ValueError: bad input, a damaged checkpoint, or a network that cannot be exported.
    """
    options: Export
    options, rest = parse_with_run(Export, arguments or ["--help"], "bitfleet export")
    from bitfleet.launch.export.export import export_packed

    print(export_packed(options.source, options.output, options.image_size, rest))
