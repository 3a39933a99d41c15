"""`bitfleet run`: classify images with an exported network."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import Count, MaybeCount, parse


@dataclasses.dataclass(frozen=True)
class Run:
    """Classify images with a file of `bitfleet export`, or evaluate it on a validation set."""

    program: Positional[Path]
    """File of `bitfleet export`."""
    images: Positional[tuple[Path, ...]] = ()
    """Images to classify."""
    data: str | None = None
    """Data set to evaluate on, instead of images: as data.root of a run."""
    threads: Count = 1
    """Threads per image."""
    top: MaybeCount = None
    """With images: classes to print per image. Default: 5."""
    limit: MaybeCount = None
    """With --data: most images to evaluate."""


def run(arguments: Sequence[str]) -> None:
    """Run the network that `arguments` name.

    Raises:
        ValueError: bad input, or a file that is not a packed program.
    """
    options: Run = parse(Run, arguments or ["--help"], "bitfleet run")
    if bool(options.images) == (options.data is not None):
        raise ValueError("bitfleet run takes either images or --data ROOT")
    if options.images and options.limit is not None:
        raise ValueError("--limit goes with --data: leave it out, all images are classified")
    if options.data is not None and options.top is not None:
        raise ValueError("--top goes with images: leave it out, --data gives top-1 and top-5")
    from bitfleet.launch.run.classify import classify, evaluate

    if options.data is not None:
        print(evaluate(options.program, options.data, options.threads, options.limit))
    else:
        for text in classify(options.program, options.images, options.threads, options.top or 5):
            print(text)
