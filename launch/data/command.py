"""Data: `bitfleet data prepare|verify|pack|compare ...`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from bitfleet.launch.job import num_cores
from bitfleet.launch.parsing.options import take_flag, take_number, take_option
from bitfleet.trainer.run.user_paths import users_path

USAGE = """usage: bitfleet data COMMAND ...

  prepare SOURCE DEST [--num_workers N] [--allow_incomplete] [--on_bad_sample fail|quarantine]
          make a data set of ILSVRC2012's archives, class folders, Tiny ImageNet, the Kaggle layout, WebDataset shards or
          CIFAR-10's python archive: archives are extracted into DEST, else DEST gets a manifest that refers to SOURCE (DEST may
          be SOURCE). An interrupted one is continued by the same command. What is there and not listed is counted and said;
          above 1 % of the images, for counts other than ImageNet's, and for classes without validation images it needs
          --allow_incomplete. Images that cannot be read are all named, or listed in DEST/quarantine.tsv by quarantine
  verify DEST [--num_workers N]
          decode every image once; what fails goes on a list that training leaves out (no file is deleted); exit code 1 then.
          For a folder that was never prepared (not archives), what fails is only named
  pack ROOT DEST [--short_side 256] [--shards] [--num_workers N]
          a resized copy (JPEG, quality 90) as folders, or as WebDataset shards, for machines whose CPUs are the limit
  compare --config NAME [--images 256] [--section.field value ...]
          the run's images by DALI and by torchvision, one by one; exit code 1 if they differ by more than rounding

Training and `verify` take DEST as it is: --data.root DEST. N is the number of processes, by default one for each core."""

_PATHS = {"prepare": 2, "verify": 1, "pack": 2}


def data(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` name.

    Raises:
        ValueError: bad input, or data that is not as it should be.
        SystemExit: 1, when images fail or differ.
    """
    if not arguments or (arguments[0] != "compare" and {"-h", "--help"} & set(arguments)):
        print(USAGE)
        return
    command, *rest = arguments
    if command == "compare":
        _compare(rest)
        return
    if command not in _PATHS:
        raise ValueError(f"there is no command {command!r} of bitfleet data; there are: prepare, verify, pack, compare")
    num_workers, rest = take_number(rest, "--num_workers", num_cores())
    if command == "prepare":
        allow_incomplete, rest = take_flag(rest, "--allow_incomplete")
        on_bad_sample, rest = take_option(rest, "--on_bad_sample")
        if on_bad_sample not in (None, "fail", "quarantine"):
            raise ValueError(f"--on_bad_sample must be fail or quarantine, not {on_bad_sample!r}")
        source, dest = _paths(command, rest)
        from bitfleet.launch.data.prepare import prepare

        print(
            prepare(
                source,
                dest,
                num_workers=num_workers,
                allow_incomplete=allow_incomplete,
                quarantine=on_bad_sample == "quarantine",
            )
        )
    elif command == "verify":
        (root,) = _paths(command, rest)
        from bitfleet.launch.data.verify import verify

        report, num_failed = verify(root, num_workers=num_workers)
        print(report)
        sys.exit(bool(num_failed))
    else:
        short_side, rest = take_number(rest, "--short_side", 256)
        shards, rest = take_flag(rest, "--shards")
        root, dest = _paths(command, rest)
        from bitfleet.launch.data.pack import pack

        print(pack(root, dest, short_side=short_side, shards=shards, num_workers=num_workers))


def _compare(arguments: Sequence[str]) -> None:
    num_images, rest = take_number(arguments, "--images", 256)
    from bitfleet.launch.parsing.arguments import parse_train

    config = parse_train(rest, "bitfleet data compare")
    from bitfleet.launch.data.compare import compare
    from bitfleet.trainer.ranks.collectives import Ranks, choose_device

    device = choose_device(config.device, Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1))
    report, num_different = compare(config.data, num_images=num_images, seed=config.seed, device=device)
    print(report)
    sys.exit(bool(num_different))


def _paths(command: str, arguments: Sequence[str]) -> list[Path]:
    if unknown := [argument for argument in arguments if argument.startswith("--")]:
        raise ValueError(f"bitfleet data {command} has no option {unknown[0]!r}; `bitfleet data --help` lists them")
    if len(arguments) != _PATHS[command]:
        raise ValueError(
            f"bitfleet data {command} takes {_PATHS[command]} paths, not {len(arguments)}; see bitfleet data --help"
        )
    return [users_path(argument) for argument in arguments]
