"""Doctor: `bitfleet doctor [--config NAME ...]`, on all ranks with `deepspeed --module bitfleet.launch doctor ...`."""

import sys
from collections.abc import Sequence

from bitfleet.launch.job import is_first_rank, job
from bitfleet.launch.parsing.arguments import parse_train

USAGE = """usage: bitfleet doctor [--config NAME --section.field value ...]
       deepspeed --hostfile hosts --module bitfleet.launch doctor [--config NAME --section.field value ...]

  Says in seconds whether a run would work: versions and builds, devices, cores, memory, disks, /dev/shm, limits, compilers,
  kernels (that of each GPU is built, run and compared with the CPU's bits); with --config the data, read from every rank; on
  several ranks clocks, latency and bandwidth between them. A difference between ranks is named with host and rank. Exit code 1 if
  a line says FAIL. Nothing is left behind."""


def doctor(arguments: Sequence[str]) -> None:
    """Examine, print the table on rank 0, and leave with 1 if anything would fail.

    Raises:
        ValueError: bad input.
        SystemExit: 1, when a check fails.
    """
    own = [a for a in arguments if not a.startswith("--local_rank=")]
    if "-h" in own or "--help" in own:
        print(USAGE)
        return
    config = parse_train(own, "bitfleet doctor") if own else None
    with job("cpu" if config and config.device == "cpu" else "auto") as (ranks, device):
        from bitfleet.launch.doctor.doctor import examine, format_checks

        checks = examine(config, ranks, device)
        if is_first_rank():
            print(format_checks(checks), flush=True)
    if any(check.verdict == "FAIL" for check in checks):
        sys.exit(1)
