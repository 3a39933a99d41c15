"""`bitfleet doctor`: whether a run would work here, on these ranks, in seconds and before it is started."""

import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from bitfleet.launch.doctor.facts import Facts, collect_facts
from bitfleet.launch.doctor.installation import (
    check_c_compiler,
    check_compiler,
    check_config,
    check_cuda,
    check_dali,
    check_git,
    check_gpu_kernels,
    check_kernels,
    check_versions,
)
from bitfleet.launch.doctor.links import check_bandwidth, check_clocks, check_latency
from bitfleet.launch.doctor.machines import (
    check_cache,
    check_cores,
    check_data,
    check_devices,
    check_memory,
    check_open_files,
    check_run_folder,
    check_shm,
)
from bitfleet.launch.doctor.network import Network, measure_network
from bitfleet.launch.doctor.table import Check
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import decoder_of
from bitfleet.trainer.ranks.collectives import Ranks, barrier, from_first_rank, objects_from_ranks

LINE = 120


def examine(config: TrainConfig | None, ranks: Ranks, device: torch.device) -> list[Check]:
    """Collect the facts of all ranks, measure between them, and judge; every rank calls this and gets the same lines.

    Args:
        config: a run; None leaves out what depends on one.
        ranks: this process's place.
        device: whose kernels are tried and whose links are measured.
    """
    facts = objects_from_ranks(collect_facts(config, ranks, device))
    sees = _sees_run_folder(facts[0], ranks)
    network = measure_network(ranks, device)
    wants_gpu = config is not None and config.device == "gpu"
    wants_dali = config is None or decoder_of(config.data) == "dali"
    return all_checks(facts, network, sees, wants_gpu=wants_gpu, wants_dali=wants_dali)


def all_checks(
    facts: Sequence[Facts], network: Network | None, sees_run_folder: Sequence[bool], wants_gpu: bool, wants_dali: bool
) -> list[Check]:
    """Every line.

    Args:
        facts: of all ranks, in their order.
        network: None for a single rank.
        sees_run_folder: for each rank, whether it sees what rank 0 writes beside the run folders.
        wants_gpu: the configuration asks for one.
        wants_dali: the configuration reads with it.
    """
    checks = check_versions(facts)
    checks += [check_git(facts), check_cuda(facts), check_dali(facts, wants_dali), check_devices(facts, wants_gpu)]
    checks += [check_cores(facts), check_memory(facts), check_run_folder(facts, sees_run_folder)]
    checks += [check_cache(facts), check_shm(facts), check_open_files(facts), check_compiler(facts)]
    checks += [check_c_compiler(facts), check_kernels(facts), check_gpu_kernels(facts)]
    if facts[0].config is not None:
        checks += [check_config(facts), check_data(facts)]
    if network is not None:
        checks += [check_clocks(facts, network), check_latency(facts, network), check_bandwidth(facts, network)]
    return checks


def _sees_run_folder(first: Facts, ranks: Ranks) -> list[bool]:
    """For each rank, whether a folder that rank 0 makes where runs are written is there; it is removed again."""
    if first.free_run is None:
        return [True] * ranks.world_size
    made = None
    if ranks.is_first:
        made = tempfile.TemporaryDirectory(prefix=".bitfleet-doctor-", dir=first.run_folder)
    path = Path(from_first_rank(made.name if made else ""))
    seen = objects_from_ranks(path.is_dir())
    barrier()
    if made:
        made.cleanup()
    return seen


def format_checks(checks: Sequence[Check]) -> str:
    """The table: a line a check, and below those that are not OK what to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.verdict:4}  {check.name:{width}}  {check.value}")
        if check.advice:
            indent = " " * (width + 8)
            lines += textwrap.wrap(check.advice, LINE, initial_indent=f"{indent}-> ", subsequent_indent=indent + "   ")
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("OK", "WARN", "FAIL")}
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return "\n".join(lines)
