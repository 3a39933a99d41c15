"""`bitfleet launch`: start a run on one machine or many, or print each launcher's command."""

import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bitfleet.launch.cluster.hosts import Host, check_reachable, is_here, reachable_address, read_hostfile
from bitfleet.launch.cluster.launchers import (
    PRINTERS,
    SSH_OPTIONS,
    Request,
    deepspeed_line,
    deepspeed_words,
    host_zero,
    tool,
    traveling,
    users_lines,
)
from bitfleet.launch.cluster.supervise import ask_by_file, ask_ranks, supervise
from bitfleet.launch.job import free_port
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.parsing.commands import MaybeCount, parse_with_run
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.run.stop import STOP_FILE


@dataclasses.dataclass(frozen=True)
class Launch:
    """Start a run on all ranks under DeepSpeed, and stay above it; or print how another launcher
    starts it.

    The options of the run follow: --config NAME [--section.field value ...], or --reproduce NAME
    for `bitfleet reproduce NAME` on all ranks. SIGTERM, SIGUSR1, SIGINT and SIGHUP make all ranks
    save and end (exit code 75), no process is left behind, and the exit code is not 0 if the
    launcher was killed.
    """

    launcher: Positional[Literal["deepspeed", "slurm", "torchrun", "mpirun", "kubernetes"]]
    """Only deepspeed is started; the others are printed."""
    print: bool = False
    """Only show the command, and what it assumes."""
    gpus: MaybeCount = None
    """Ranks per node, one per GPU (CPU ranks without GPUs). Default: the GPUs here, or 1."""
    nodes: MaybeCount = None
    """Nodes (slurm, kubernetes; torchrun and mpirun with --master_addr)."""
    hostfile: Path | None = None
    """File with a line `node1 slots=8` per node, instead of --gpus and --nodes."""
    no_ssh: bool = False
    """deepspeed: start the ranks of this node only; the same command runs on every node."""
    node_rank: int | None = None
    """Number of this node, from 0, with --no_ssh."""
    master_addr: str | None = None
    """Machine where the ranks meet. Default: the first node."""
    master_port: MaybeCount = None
    """Port where the ranks meet. Default: 29500; on one machine any free port."""


@dataclasses.dataclass(frozen=True)
class _Reproduce:
    reproduce: str | None = None


def launch(arguments: Sequence[str]) -> None:
    """Start a run, or print how.

    Raises:
        ValueError: bad input.
        SystemExit: with the exit code of the run.
    """
    options: Launch
    options, rest = parse_with_run(Launch, arguments or ["--help"], "bitfleet launch")
    request, config = _make_request(options, rest)
    if options.print:
        print(PRINTERS[options.launcher](request))
    elif options.launcher != "deepspeed":
        raise ValueError(
            f"bitfleet launch starts deepspeed only: bitfleet launch --print {options.launcher} shows what you start"
        )
    else:
        sys.exit(start(request, config))


def read_request(arguments: Sequence[str], launcher: str) -> tuple[Request, TrainConfig]:
    """Return the run that `arguments` ask `launcher` for; the options of the run are checked before
    any node is asked.

    Raises:
        ValueError: bad input.
    """
    return _make_request(*parse_with_run(Launch, [launcher, *arguments], "bitfleet launch"))


def _make_request(options: Launch, rest: Sequence[str]) -> tuple[Request, TrainConfig]:
    config = _parse_run(rest, f"bitfleet launch {options.launcher}")
    _check_belongs(options)
    if (options.master_port or 0) > 65535:
        raise ValueError(f"--master_port must be at most 65535, not {options.master_port}")
    if options.hostfile and (options.nodes or options.gpus):
        raise ValueError("--hostfile says how many nodes and ranks there are: leave out --nodes and --gpus")
    if options.hostfile:
        hosts = read_hostfile(options.hostfile)
    else:
        hosts = [Host("", options.gpus or gpus_here())] * (options.nodes or 1)
    if len(hosts) > 1 and config.run_dir is None:
        raise ValueError("pass --run_dir: a folder that all nodes share, where the run and its checkpoints are")
    request = Request(
        tuple(hosts),
        tuple(rest),
        options.hostfile,
        options.master_addr,
        options.master_port,
        exports=traveling(os.environ, config.device),
    )
    return (_for_deepspeed(request, options) if options.launcher == "deepspeed" else request), config


def _check_belongs(options: Launch) -> None:
    """Refuse options that the launcher has no use for."""
    if options.launcher != "deepspeed" and (options.no_ssh or options.node_rank is not None):
        raise ValueError(f"--no_ssh and --node_rank are for deepspeed, not {options.launcher}: leave them out")
    if options.launcher in ("slurm", "kubernetes") and (options.master_addr or options.master_port):
        where = {
            "slurm": "export MASTER_ADDR or MASTER_PORT before sbatch",
            "kubernetes": "write it into the command of kubernetes.yaml",
        }
        raise ValueError(
            f"under {options.launcher} the ranks meet at the first node without --master_addr and --master_port: leave "
            f"them out, or {where[options.launcher]}"
        )


def _parse_run(arguments: Sequence[str], prog: str) -> TrainConfig:
    asked, rest = parse_with_run(_Reproduce, arguments, prog)
    if asked.reproduce is None:
        return parse_train(arguments, prog)
    from bitfleet.launch.reproduce.command import parse_reproduce

    *_, config = parse_reproduce([asked.reproduce, *rest])
    return config


def _for_deepspeed(request: Request, options: Launch) -> Request:
    """Return `request` with the traps of DeepSpeed's command avoided."""
    several, first = len(request.hosts) > 1, request.hosts[0].name
    if several and request.hostfile is None:
        raise ValueError("deepspeed on several nodes needs --hostfile (a line `node1 slots=8` for each)")
    if options.no_ssh or options.node_rank is not None:
        if not options.no_ssh or options.node_rank is None or request.hostfile is None:
            raise ValueError("--no_ssh, --node_rank and --hostfile go together: each node is started with its number")
        last = len(request.hosts) - 1
        if not 0 <= options.node_rank <= last:
            raise ValueError(f"--node_rank must be a number from 0 to {last}, not {options.node_rank}")
        meeting_point = request.master_addr or host_zero(request)
        return dataclasses.replace(request, node_rank=options.node_rank, master_addr=meeting_point)
    if several or (first and not is_here(first)):
        address = request.master_addr or reachable_address(first)
        return dataclasses.replace(request, remote=not several, master_addr=address)
    return dataclasses.replace(request, hostfile=None)  # this machine alone: no ssh to itself


def start(request: Request, config: TrainConfig) -> int:
    """Run DeepSpeed's command below this process; return the exit code of the run.

    Raises:
        ValueError: pdsh is missing, ssh does not reach a host, or a line of the user's
            .deepspeed_env cannot be read, or DeepSpeed's command is missing.
    """
    if not Path(tool("deepspeed")).exists():
        raise ValueError(
            f"DeepSpeed's command is not at {tool('deepspeed')}, and not on PATH: add the folder that pip wrote it to "
            "(`pip show --files deepspeed` lists it)"
        )
    if request.by_ssh:
        return _start_over_ssh(request, config)
    environ = dict(os.environ)
    if request.node_rank is None:
        visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        on_gpus = config.device != "cpu" and gpus_here(0) > 0
        request = dataclasses.replace(
            request,
            master_port=request.master_port or free_port(),
            visible_devices=on_gpus and len(visible) == request.world_size,
        )
    told: set[int] = set()
    return supervise(deepspeed_words(request), environ, lambda number: ask_ranks(number, told))


def _start_over_ssh(request: Request, config: TrainConfig) -> int:
    if shutil.which("pdsh") is None:
        raise ValueError(
            "DeepSpeed reaches other machines through pdsh, which is not installed here (apt-get install pdsh)"
        )
    if config.run_dir is None:
        raise ValueError(
            "pass --run_dir: a folder that this machine and the other share, where the run and its checkpoints are"
        )
    stop_file, written = config.run_dir / STOP_FILE, list[float]()
    environ = dict(os.environ)
    environ["PDSH_SSH_ARGS_APPEND"] = f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    if "PDSH_SSH_ARGS" not in environ:  # the user's way to call ssh
        check_reachable([host.name for host in request.hosts], environ["PDSH_SSH_ARGS_APPEND"])
    lines = users_lines((Path.home(), Path.cwd()))
    lines += [deepspeed_line(name, value) for name, value in request.exports.items()]
    names = " ".join(line.partition("=")[0].strip() for line in lines) or "none"

    def ask(_: signal.Signals) -> None:
        ask_by_file(stop_file, written)

    with tempfile.TemporaryDirectory(prefix="bitfleet-") as folder:
        file = Path(folder, "deepspeed_env")
        file.write_text("".join(f"{line}\n" for line in lines))
        environ["DS_ENV_FILE"] = str(file)  # replaces the user's files, whose lines it holds
        ranks = f"{request.world_size} ranks on {len(request.hosts)} host(s)"
        print(f"bitfleet: {ranks}; environment that travels: {names}", flush=True)
        code = supervise(deepspeed_words(request), environ, ask)
    if written:
        stop_file.unlink(missing_ok=True)
    return code


def gpus_here(otherwise: int = 1) -> int:
    """Return the number of GPUs that this process may use; `otherwise` without any."""
    import torch

    return torch.cuda.device_count() or otherwise
