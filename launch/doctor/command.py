"""`bitfleet doctor`, on all ranks with `deepspeed --module bitfleet.launch doctor ...`."""

import dataclasses
import sys
from collections.abc import Sequence

from bitfleet.launch.job import is_main_rank, job
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.parsing.commands import parse_with_run


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say in seconds whether a run would work.

    Examines versions and builds, devices, cores, memory, disks, /dev/shm, limits, compilers and
    kernels (that of each GPU is built, run and compared with the CPU's bits); on several ranks
    (deepspeed --hostfile hosts --module bitfleet.launch doctor ...) also clocks, latency and
    bandwidth between them. A difference between ranks is named with host and rank. Exit code 1 if a
    line says FAIL. Nothing is left behind.
    """

    config: str | None = None
    """Run whose data to read from every rank; --section.field value ... may follow."""


def doctor(arguments: Sequence[str]) -> None:
    """Examine, print the table on rank 0, and leave with 1 if anything would fail.

    Raises:
        ValueError: bad input.
        SystemExit: 1, when a check fails.
    """
    parse_with_run(Doctor, arguments, "bitfleet doctor")  # --help
    config = parse_train(arguments, "bitfleet doctor") if arguments else None
    with job("cpu" if config and config.device == "cpu" else "auto") as (ranks, device):
        from bitfleet.launch.doctor.doctor import examine, format_checks

        checks = examine(config, ranks, device)
        if is_main_rank():
            print(format_checks(checks), flush=True)
    if any(check.verdict == "FAIL" for check in checks):
        sys.exit(1)
