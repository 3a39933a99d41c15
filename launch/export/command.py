"""`bitfleet export`: write the network of a run for devices."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import MaybeCount, MaybeCountOrZero, parse_with_run


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the network of a run for devices or other tools, and compare it with the network.

    `bitfleet run OUTPUT IMAGE...` runs the packed format. A file of weights needs the configuration
    of its network behind it: --config NAME [--section.field value ...].
    """

    source: Positional[Path]
    """Run folder (its newest checkpoint is taken), checkpoint, or a file of weights."""
    output: Positional[Path]
    """File to write; of the format c two, OUTPUT.c and OUTPUT.h."""
    format: Literal["packed", "onnx", "qonnx", "c"] = "packed"
    """packed: bitfleet's own, whose binary weights are bits. onnx: float32, for ONNX Runtime and
    other tools. qonnx: for FINN and other tools of FPGAs. c: source code for microcontrollers."""
    image_size: MaybeCount = None
    """Height and width of the images, pixels. Default: those of the run."""
    precise_bn_steps: MaybeCountOrZero = None
    """Measure BatchNorm's statistics on the training images of the last N steps before the
    checkpoint; 0: its running averages, which may lag behind the weights. Default: as the run
    validated."""


def export(arguments: Sequence[str]) -> None:
    """Write what `arguments` ask for.

    Raises:
        ValueError: bad input, a damaged checkpoint, or a network that cannot be exported.
    """
    options: Export
    options, rest = parse_with_run(Export, arguments or ["--help"], "bitfleet export")
    if options.format == "packed":
        from bitfleet.launch.export.export import export_packed as write
    elif options.format == "onnx":
        from bitfleet.launch.export.onnx_export import export_onnx as write
    elif options.format == "qonnx":
        from bitfleet.launch.export.onnx_export import export_qonnx as write
    else:
        from bitfleet.launch.export.c_export import export_c as write
    print(write(options, rest))
