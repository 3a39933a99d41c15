"""`bitfleet journal`: rebuild weights from a flip journal, summarize it, and verify it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import parse


@dataclasses.dataclass(frozen=True)
class Weights:
    """Write the binary weights after a step as safetensors, as +-1 in fp32."""

    run: Positional[Path]
    """Folder of a run that was trained with --journal.enabled True (docs/journal.md)."""
    step: int
    """Number of optimizer steps done; 0: the initial weights."""
    output: Path | None = None
    """File to write, .safetensors. Default: weights-STEP.safetensors in the run folder."""
    packed: bool = False
    """Write the weights as bits, 8 per byte."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Print the steps that the journal covers, and its bytes and flips per step."""

    run: Positional[Path]
    """Folder of the run."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Read the whole journal and compare it, bit for bit, with the weights of every checkpoint."""

    run: Positional[Path]
    """Folder of the run."""


def journal(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` name.

    Raises:
        ValueError: bad input, or a journal that is damaged or differs from a checkpoint.
    """
    options = parse(Weights | Info | Verify, arguments, "bitfleet journal")
    from bitfleet.launch.journal import tools

    match options:
        case Weights():
            output = options.output or options.run / f"weights-{options.step:08d}.safetensors"
            print(tools.export_weights(options.run, options.step, output, packed=options.packed))
        case Info():
            print(tools.info(options.run))
        case Verify():
            print(tools.verified(options.run))
