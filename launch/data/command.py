"""`bitfleet data`: prepare, verify, pack and compare data sets; write a teacher's logits."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bitfleet.launch.job import job, num_cores
from bitfleet.launch.parsing.commands import Count, parse, parse_with_run


@dataclass(frozen=True)
class Prepare:
    """Make a data set of ILSVRC2012's archives, class folders, Tiny ImageNet, the Kaggle layout,
    WebDataset shards or CIFAR-10's python archive. Archives are extracted into DEST; for other
    layouts DEST gets a manifest that refers to SOURCE (DEST may be SOURCE). The same command
    continues an interrupted one. What is there and not listed is counted and printed. Training and
    verify take DEST: --data.root DEST."""

    source: Positional[Path]
    """Folder with the data, or CIFAR-10's archive."""
    dest: Positional[Path]
    """Folder of the data set."""
    num_workers: Count = field(default_factory=num_cores)
    """Number of processes; by default one per core."""
    allow_incomplete: bool = False
    """Accept more than 1 % of the images left out, counts other than ImageNet's, and classes
    without validation images."""
    on_bad_sample: Literal["fail", "quarantine"] = "fail"
    """Images that cannot be read: name all of them and stop, or list them in DEST/quarantine.tsv,
    which training leaves out."""


@dataclass(frozen=True)
class Verify:
    """Decode every image once. Images that fail are put on a list that training leaves out (no file
    is deleted); exit code 1 then. In a folder that was never prepared (not archives), they are only
    named."""

    dest: Positional[Path]
    """Folder of the data set."""
    num_workers: Count = field(default_factory=num_cores)
    """Number of processes; by default one per core."""


@dataclass(frozen=True)
class Pack:
    """Write a resized copy (JPEG, quality 90) of a prepared data set, for slow CPUs."""

    root: Positional[Path]
    """Folder of the data set."""
    dest: Positional[Path]
    """Folder of the copy."""
    short_side: Count = 256
    """Pixels of the short side; smaller images keep their size."""
    shards: bool = False
    """Write WebDataset shards instead of a file per image."""
    num_workers: Count = field(default_factory=num_cores)
    """Number of processes; by default one per core."""


@dataclass(frozen=True)
class Compare:
    """Compare the run's images read by DALI and by torchvision, one by one. Takes --config NAME and
    the options of a run; exit code 1 if they differ by more than rounding."""

    images: Count = 256
    """Images per split."""


@dataclass(frozen=True)
class Teach:
    """Write the logits of a run's teacher for its training images, epoch by epoch, into the folder
    distill.cache. Takes --config NAME and the options of the run. The logits are for its seed,
    data, augmentation, teacher and global_batch_size / num_replicas. The same command continues an
    interrupted one, and repairs damaged files. It runs on one rank: for more GPUs start a command
    for each range of epochs, in the same folder."""

    first_epoch: int = 0
    """First epoch; they count from 0."""
    last_epoch: int | None = None
    """Last epoch. None: the last one of the run."""


def data(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` name.

    Raises:
        ValueError: Bad input, or data that is not as it should be.
        SystemExit: 1, when images fail or differ.
    """
    if arguments[:1] == ["compare"]:
        _compare(arguments[1:])
        return
    if arguments[:1] == ["teach"]:
        _teach(arguments[1:])
        return
    options = parse(Prepare | Verify | Pack | Compare | Teach, arguments, "bitfleet data")
    match options:
        case Prepare():
            from bitfleet.launch.data.prepare import prepare

            print(
                prepare(
                    options.source,
                    options.dest,
                    num_workers=options.num_workers,
                    allow_incomplete=options.allow_incomplete,
                    quarantine=options.on_bad_sample == "quarantine",
                )
            )
        case Verify():
            from bitfleet.launch.data.verify import verify

            report, num_failed = verify(options.dest, num_workers=options.num_workers)
            print(report)
            sys.exit(bool(num_failed))
        case Pack():
            from bitfleet.launch.data.pack import pack

            print(
                pack(
                    options.root,
                    options.dest,
                    short_side=options.short_side,
                    shards=options.shards,
                    num_workers=options.num_workers,
                )
            )


def _compare(arguments: Sequence[str]) -> None:
    options, rest = parse_with_run(Compare, arguments, "bitfleet data compare")
    from bitfleet.launch.parsing.arguments import parse_train

    config = parse_train(rest, "bitfleet data compare")
    from bitfleet.launch.data.compare import compare
    from bitfleet.trainer.ranks.collectives import Ranks, choose_device

    device = choose_device(config.device, Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1))
    report, num_different = compare(config.data, num_images=options.images, seed=config.seed, device=device)
    print(report)
    sys.exit(bool(num_different))


def _teach(arguments: Sequence[str]) -> None:
    options, rest = parse_with_run(Teach, arguments, "bitfleet data teach")
    from bitfleet.launch.parsing.arguments import parse_train

    config = parse_train(rest, "bitfleet data teach")
    from bitfleet.launch.data.teach import teach

    with job(config.device, config) as (ranks, device):
        for line in teach(config, options.first_epoch, options.last_epoch, ranks, device):
            print(line, flush=True)
