"""Launch: `bitfleet launch deepspeed ...` starts a run on one machine or many, `--print` shows each launcher's command."""

import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bitfleet.launch.cluster.exports import deepspeed_line, traveling, users_lines
from bitfleet.launch.cluster.hosts import Host, check_reachable, is_here, reachable_address, read_hostfile
from bitfleet.launch.cluster.launchers import PRINTERS, SSH_OPTIONS, Request, deepspeed_words, host_zero
from bitfleet.launch.cluster.supervise import ask_by_file, ask_ranks, supervise
from bitfleet.launch.job import free_port
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.parsing.options import take_flag, take_number, take_option
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.run.stop import STOP_FILE
from bitfleet.trainer.run.user_paths import users_path

USAGE = """usage: bitfleet launch deepspeed --config NAME [where] [--section.field value ...]
       bitfleet launch --print deepspeed|slurm|torchrun|mpirun|kubernetes --config NAME [where] [--section.field value ...]

With --reproduce NAME instead of --config it is `bitfleet reproduce NAME` on all ranks.

Starts the run under DeepSpeed and stays above it: SIGTERM, SIGUSR1, SIGINT and SIGHUP make all ranks save and end (exit code
75), nobody is left behind, and the exit code is not 0 when the launcher was killed. With --print only shows the command, and
what it assumes.

  --gpus 8                  ranks on a node, one a GPU (CPU ranks without GPUs); default: the GPUs here, or 1
  --nodes 4                 number of nodes (slurm, kubernetes; torchrun and mpirun with --master_addr)
  --hostfile hosts          instead of both: `node1 slots=8`, a line a node
  --no_ssh --node_rank 1    deepspeed: start the ranks of this node only; the same command runs on every node
  --master_addr, --master_port     where the ranks meet; default: the first node, 29500 (alone: any free port)"""


def launch(arguments: Sequence[str]) -> None:
    """Start a run, or print how.

    Raises:
        ValueError: bad input.
        SystemExit: with the exit code of the run.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    only_print, rest = take_flag(arguments, "--print")
    launcher, *rest = rest or [""]
    if launcher not in PRINTERS:
        raise ValueError(f"bitfleet launch starts or prints one of {', '.join(PRINTERS)}, not {launcher!r}")
    request, config = read_request(rest, launcher)
    if only_print:
        print(PRINTERS[launcher](request))
    elif launcher != "deepspeed":
        raise ValueError(
            f"bitfleet launch starts deepspeed only: bitfleet launch --print {launcher} shows what you start"
        )
    else:
        sys.exit(start(request, config))


def read_request(arguments: Sequence[str], launcher: str) -> tuple[Request, TrainConfig]:
    """What `arguments` ask for; the options of the run itself are checked here already, before any node is asked.

    Raises:
        ValueError: bad input.
    """
    hostfile, rest = take_option(arguments, "--hostfile")
    address, rest = take_option(rest, "--master_addr")
    port, rest = take_number(rest, "--master_port", 0)
    node_rank, rest = take_option(rest, "--node_rank")
    no_ssh, rest = take_flag(rest, "--no_ssh")
    nodes, rest = take_number(rest, "--nodes", 0)
    gpus, rest = take_number(rest, "--gpus", 0)
    config = _parse_run(rest, f"bitfleet launch {launcher}")
    if port > 65535:
        raise ValueError(f"--master_port must be at most 65535, not {port}")
    if hostfile and (nodes or gpus):
        raise ValueError("--hostfile says how many nodes and ranks there are: leave out --nodes and --gpus")
    hosts = read_hostfile(users_path(hostfile)) if hostfile else [Host("", gpus or gpus_here())] * (nodes or 1)
    request = Request(
        tuple(hosts),
        tuple(rest),
        users_path(hostfile) if hostfile else None,
        address,
        port or None,
        exports=traveling(os.environ, config.device),
    )
    if len(hosts) > 1 and config.run_dir is None:
        raise ValueError("pass --run_dir: a folder that all nodes share, where the run and its checkpoints are")
    return (_for_deepspeed(request, no_ssh, node_rank) if launcher == "deepspeed" else request), config


def _parse_run(arguments: Sequence[str], prog: str) -> TrainConfig:
    name, rest = take_option(arguments, "--reproduce")
    if name is None:
        return parse_train(arguments, prog)
    from bitfleet.launch.reproduce.command import parse_reproduce

    *_, config = parse_reproduce([name, *rest])
    return config


def _for_deepspeed(request: Request, no_ssh: bool, node_rank: str | None) -> Request:
    """With the traps of DeepSpeed's command avoided."""
    several = len(request.hosts) > 1
    if several and request.hostfile is None:
        raise ValueError("deepspeed on several nodes needs --hostfile (a line `node1 slots=8` for each)")
    if no_ssh or node_rank is not None:
        if not no_ssh or node_rank is None or request.hostfile is None:
            raise ValueError("--no_ssh, --node_rank and --hostfile go together: each node is started with its number")
        if not node_rank.isdecimal() or int(node_rank) >= len(request.hosts):
            raise ValueError(f"--node_rank must be a number from 0 to {len(request.hosts) - 1}, not {node_rank!r}")
        return dataclasses.replace(
            request, node_rank=int(node_rank), master_addr=request.master_addr or host_zero(request)
        )
    if several or not (request.hosts[0].name == "" or is_here(request.hosts[0].name)):
        address = request.master_addr or reachable_address(request.hosts[0].name)
        return dataclasses.replace(request, remote=not several, master_addr=address)
    # One machine, this one: no ssh to itself.
    return dataclasses.replace(request, hostfile=None)


def start(request: Request, config: TrainConfig) -> int:
    """Run DeepSpeed's command below this process; the exit code of the run.

    Raises:
        ValueError: pdsh is missing, ssh does not reach a host, or a line of a .deepspeed_env of the user's cannot be read.
    """
    environ = dict(os.environ)
    told: set[int] = set()
    if not request.by_ssh:
        if request.node_rank is None:
            port = request.master_port or free_port()
            visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            on_gpus = config.device != "cpu" and gpus_here(0) > 0
            request = dataclasses.replace(
                request, master_port=port, visible_devices=on_gpus and len(visible) == request.world_size
            )
        return supervise(deepspeed_words(request), environ, lambda number: ask_ranks(number, told))
    if shutil.which("pdsh") is None:
        raise ValueError(
            "DeepSpeed reaches other machines through pdsh, which is not installed here (apt-get install pdsh)"
        )
    if config.run_dir is None:
        raise ValueError(
            "pass --run_dir: a folder that this machine and the other share, where the run and its checkpoints are"
        )
    stop_file, written = config.run_dir / STOP_FILE, list[float]()
    environ["PDSH_SSH_ARGS_APPEND"] = f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    if "PDSH_SSH_ARGS" not in environ:  # the user's own way to call ssh
        check_reachable([host.name for host in request.hosts], environ["PDSH_SSH_ARGS_APPEND"])
    lines = users_lines((Path.home(), Path.cwd()))
    lines += [deepspeed_line(name, value) for name, value in request.exports.items()]
    with tempfile.TemporaryDirectory(prefix="bitfleet-") as folder:
        file = Path(folder, "deepspeed_env")
        file.write_text("".join(f"{line}\n" for line in lines))
        environ["DS_ENV_FILE"] = str(file)  # in the place of the user's, whose lines it holds
        names = " ".join(line.partition("=")[0].strip() for line in lines)
        print(
            f"bitfleet: {request.world_size} ranks on {len(request.hosts)} host(s); environment that travels: {names or 'none'}"
        )
        sys.stdout.flush()

        def ask(_: signal.Signals) -> None:
            ask_by_file(stop_file, written)

        code = supervise(deepspeed_words(request), environ, ask)
    if written:
        stop_file.unlink(missing_ok=True)
    return code


def gpus_here(otherwise: int = 1) -> int:
    """GPUs that this process may use; `otherwise` without any."""
    import torch

    return torch.cuda.device_count() or otherwise
