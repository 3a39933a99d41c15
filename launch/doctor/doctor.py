"""Examine whether a run would work on these ranks, in seconds and before it is started."""

import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from bitfleet.launch.doctor.checks import (
    Check,
    check_compilers,
    check_cores,
    check_data,
    check_devices,
    check_installation,
    check_model,
    check_room,
    check_teacher,
    same,
)
from bitfleet.launch.doctor.facts import Facts, collect_facts
from bitfleet.launch.doctor.network import Network, check_network, measure_network
from bitfleet.launch.text import table
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import decoder_of
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_objects, barrier, broadcast_object

LINE = 120


def examine(config: TrainConfig | None, ranks: Ranks, device: torch.device) -> list[Check]:
    """Collect the facts of all ranks, measure between them, and judge; every rank calls this and
    gets the same checks.

    Args:
        config: a run; None leaves out what depends on one.
        ranks: this process's place.
        device: where kernels are tried and between which bandwidth is measured.
    """
    facts = all_gather_objects(collect_facts(config, ranks, device))
    sees = _sees_run_folder(facts[0], ranks)
    network = measure_network(ranks, device)
    wanted = config.device if config else "auto"
    wants_dali = config is None or decoder_of(config.data) == "dali"
    return all_checks(facts, network, sees, wanted=wanted, wants_dali=wants_dali)


def all_checks(
    facts: Sequence[Facts], network: Network | None, sees_run_folder: Sequence[bool], wanted: str, wants_dali: bool
) -> list[Check]:
    """Return every check.

    Args:
        facts: those of all ranks, in their order.
        network: None for a single rank.
        sees_run_folder: for each rank, whether it sees what rank 0 writes next to the run folders.
        wanted: device of the configuration, "auto", "cpu" or "gpu".
        wants_dali: the configuration reads with DALI.
    """
    checks = [*check_installation(facts, wants_dali), check_devices(facts, wanted), check_cores(facts)]
    checks += [*check_room(facts, sees_run_folder), *check_compilers(facts)]
    if facts[0].config is not None:
        advice = "the hosts have other files in configs/ or other options"
        checks += [same("configuration", facts, lambda rank: str(rank.config)[:12], advice), check_data(facts)]
        checks += [*check_model(facts), *check_teacher(facts)]
    return checks if network is None else [*checks, *check_network(facts, network)]


def _sees_run_folder(first: Facts, ranks: Ranks) -> list[bool]:
    """Return for each rank whether it sees a folder that rank 0 makes where runs are written; it is
    removed again."""
    if first.free_run is None:
        return [True] * ranks.world_size
    prefix, parent = ".bitfleet-doctor-", first.run_folder
    folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent) if ranks.is_main else None
    seen = all_gather_objects(Path(broadcast_object(folder.name if folder else "")).is_dir())
    barrier()
    if folder:
        folder.cleanup()
    return seen


def format_checks(checks: Sequence[Check]) -> str:
    """Return the table: a line per check, and below those that are not OK what to do."""
    rows = table([(f"{check.verdict:4}", check.name, check.value) for check in checks], "<<<").splitlines()
    indent = " " * (max(len(check.name) for check in checks) + 8)
    lines = []
    for check, row in zip(checks, rows, strict=True):
        lines.append(row)
        lines += textwrap.wrap(check.advice, LINE, initial_indent=f"{indent}-> ", subsequent_indent=indent + "   ")
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("OK", "WARN", "FAIL")}
    return "\n".join([*lines, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])
