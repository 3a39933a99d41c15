"""Checkpoint: `bitfleet checkpoint inspect|verify|weights|diff ...`."""

import sys
from collections.abc import Sequence

from bitfleet.trainer.run.user_paths import users_path

USAGE = """usage: bitfleet checkpoint COMMAND ...

  inspect PATH                       step, epoch, files, hashes, tensors, sizes, metrics, versions and configuration
  verify PATH                        read everything again and compare it with the hashes
  weights PATH OUT.safetensors [--packed]
                                     the model alone; binary weights as +-1 in fp32, or packed, 8 a byte
  diff A B                           the first tensor and element that differ; exit code 1 if there is one

PATH is a checkpoint (runs/NAME/DATE/checkpoints/step-00001234) or a run folder, whose newest one is taken."""


def checkpoint(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` name.

    Raises:
        ValueError: bad input, or a damaged checkpoint.
        SystemExit: 1, when two checkpoints differ.
    """
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return
    command, *rest = arguments
    packed = command == "weights" and "--packed" in rest
    paths = [users_path(argument) for argument in rest if argument != "--packed" or command != "weights"]
    wanted = {"inspect": 1, "verify": 1, "weights": 2, "diff": 2}.get(command)
    if wanted is None:
        raise ValueError(
            f"there is no command {command!r} of bitfleet checkpoint; there are: inspect, verify, weights, diff"
        )
    if unknown := [argument for argument in map(str, paths) if argument.startswith("--")]:
        raise ValueError(
            f"bitfleet checkpoint {command} has no option {unknown[0]!r}; `bitfleet checkpoint --help` lists them"
        )
    if len(paths) != wanted:
        raise ValueError(
            f"bitfleet checkpoint {command} takes {wanted} paths, not {len(paths)}; see bitfleet checkpoint --help"
        )
    from bitfleet.launch.checkpoint import tools as checkpoint_tools

    if command == "inspect":
        print(checkpoint_tools.inspect(paths[0]))
    elif command == "verify":
        print(checkpoint_tools.verified(paths[0]))
    elif command == "weights":
        print(checkpoint_tools.export_weights(paths[0], paths[1], packed=packed))
    elif difference := checkpoint_tools.first_difference(paths[0], paths[1]):
        print(difference)
        sys.exit(1)
    else:
        print("every tensor has the same bits")
