"""Flip journal: `bitfleet journal weights|info|verify RUN ...`."""

from collections.abc import Sequence

from bitfleet.launch.parsing.options import take_flag, take_option
from bitfleet.trainer.run.user_paths import users_path

USAGE = """usage: bitfleet journal COMMAND RUN ...

  weights RUN --step K [--output FILE.safetensors] [--packed]
                 the binary weights after K optimizer steps (0: the first ones), as +-1 in fp32 or packed, 8 a byte; into RUN
                 unless --output says where
  info RUN       steps covered, bytes and flips a step
  verify RUN     read everything, rebuild the weights of every checkpoint that there is and compare them bit for bit

RUN is the folder of a run that was trained with --journal.enabled True (docs/journal.md)."""


def journal(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` name.

    Raises:
        ValueError: bad input, or a journal that is damaged or differs from a checkpoint.
    """
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return
    command, *rest = arguments
    if command not in ("weights", "info", "verify"):
        raise ValueError(f"there is no command {command!r} of bitfleet journal; there are: weights, info, verify")
    step, output, packed = None, None, False
    if command == "weights":
        step, rest = take_option(rest, "--step")
        output, rest = take_option(rest, "--output")
        packed, rest = take_flag(rest, "--packed")
        if step is None or not step.isdecimal():
            given = f", not {step!r}" if step else ""
            raise ValueError(f"bitfleet journal weights needs --step K, a number of optimizer steps{given}")
    if unknown := [argument for argument in rest if argument.startswith("--")]:
        raise ValueError(
            f"bitfleet journal {command} has no option {unknown[0]!r}; `bitfleet journal --help` lists them"
        )
    if len(rest) != 1:
        raise ValueError(
            f"bitfleet journal {command} takes one run folder, not {len(rest)}; see bitfleet journal --help"
        )
    from bitfleet.launch.journal import tools as journal_tools

    path = users_path(rest[0])
    if command == "info":
        print(journal_tools.info(path))
    elif command == "verify":
        print(journal_tools.verified(path))
    else:
        number = int(step or 0)
        out = users_path(output) if output else path / f"weights-{number:08d}.safetensors"
        print(journal_tools.export_weights(path, number, out, packed=packed))
