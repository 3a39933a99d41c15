"""The command of each launcher for one run, and what it takes for granted."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitfleet.launch.cluster.exports import deepspeed_line
from bitfleet.launch.cluster.hosts import Host
from bitfleet.launch.cluster.places import DEFAULT_PORT

MODULE = "bitfleet.launch.train"
FILES = Path(__file__).parent
SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
"""ssh never asks, and gives up a machine that has not answered for 30 s."""
SAME = "the same bitfleet, Python environment, data and working folder under the same paths on every node"
SHARED = "--run_dir on a file system that all nodes share"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is to be started."""

    hosts: tuple[Host, ...]
    """The machines; names are "" where they are not known."""
    arguments: tuple[str, ...]
    """Of launch/train.py."""
    hostfile: Path | None = None
    master_addr: str | None = None
    master_port: int | None = None
    node_rank: int | None = None
    """With --no_ssh: the number of this machine."""
    remote: bool = False
    """Whether the only host is another machine."""
    visible_devices: bool = False
    """CUDA_VISIBLE_DEVICES names a device for each rank: DeepSpeed heeds it only where it is given no number."""
    exports: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment that must travel."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return sum(host.slots for host in self.hosts)

    @property
    def by_ssh(self) -> bool:
        """Whether DeepSpeed starts ranks on other machines."""
        return self.node_rank is None and (len(self.hosts) > 1 or self.remote)

    @property
    def port(self) -> int:
        """Where rank 0 listens."""
        return self.master_port or DEFAULT_PORT


@dataclasses.dataclass(frozen=True, slots=True)
class Printed:
    """Lines for a shell, and what they assume."""

    lines: tuple[str, ...]
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self.lines, "", "It assumes:", *(f"  - {each}" for each in self.assumptions)])


def tool(name: str) -> str:
    """A command of this Python environment; relative where the environment is below the working folder, as .venv is."""
    path = Path(sys.executable).with_name(name)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def deepspeed_words(request: Request) -> list[str]:
    """DeepSpeed's command."""
    words = [tool("deepspeed")]
    if request.hostfile is not None and (request.by_ssh or request.node_rank is not None):
        words += ["--hostfile", str(request.hostfile)]
    elif not request.visible_devices:
        words += ["--num_accelerators", str(request.world_size)]
    if request.node_rank is not None:
        words += ["--no_ssh", "--node_rank", str(request.node_rank)]
    if request.remote and request.by_ssh:
        words.append("--force_multi")  # DeepSpeed would start the ranks of one remote host here
    if request.master_addr:
        words += ["--master_addr", request.master_addr]
    if request.master_port:
        words += ["--master_port", str(request.master_port)]
    arguments = [pdsh_argument(each) for each in request.arguments] if request.by_ssh else request.arguments
    return [*words, "--module", MODULE, *arguments]


def pdsh_argument(argument: str) -> str:
    """`argument` so that it survives DeepSpeed (which puts quotes around what has a space), pdsh (%) and the remote shell."""
    argument = argument.replace("%", "%%")
    if " " in argument:
        for character in ("\\", "$", "`"):
            argument = argument.replace(character, "\\" + character)
        return argument
    return shlex.quote(argument)


def print_deepspeed(request: Request) -> Printed:
    """`deepspeed`: here, over ssh, or on each node by --no_ssh."""
    command = shlex.join(deepspeed_words(request))
    if not request.by_ssh and request.node_rank is None:
        ranks = f"{request.world_size} rank{'s' * (request.world_size > 1)}"
        where = (
            "" if sum(1 for _ in request.hosts) == 1 and not request.hosts[0].name else f" ({request.hosts[0].name})"
        )
        return Printed((command,), (f"{ranks} on this machine{where}, one a GPU where there are GPUs",))
    port = f"port {request.port} and the ports that Linux gives to clients open between the nodes"
    if request.node_rank is not None:
        return Printed(
            (f"# on node {request.node_rank}; on every other node the same with its own --node_rank", command),
            (f"--master_addr {request.master_addr} reaches node 0 from every node", SAME, SHARED, port),
        )
    export = [deepspeed_line(name, value) for name, value in request.exports.items()]
    lines = [f"PDSH_SSH_ARGS_APPEND={shlex.quote(SSH_OPTIONS)} {command}"]
    if export:
        lines.insert(
            0, f"printf '%s\\n' {shlex.join(export)} >> .deepspeed_env    # your environment, for the other nodes"
        )
    address = (
        f"--master_addr {request.master_addr} reaches {request.hosts[0].name} from every node"
        if request.master_addr
        else f"the first address that `hostname -I` says on {request.hosts[0].name} is the right one (else --master_addr)"
    )
    ssh = "pdsh here; ssh without a password from here to every host of the file, this machine too if it is in it"
    return Printed(tuple(lines), (ssh, SAME, SHARED, address, port))


def print_torchrun(request: Request) -> Printed:
    """`torchrun` on every node."""
    words = ["-m", MODULE, *request.arguments]
    if len(request.hosts) == 1:
        head = [tool("torchrun"), "--standalone", "--nproc-per-node", str(request.world_size)]
        return Printed((shlex.join([*head, *words]),), (f"{request.world_size} ranks on this machine",))
    lines = []
    for rank, host in enumerate(request.hosts):
        place = ["--nnodes", str(len(request.hosts)), "--node-rank", str(rank), "--nproc-per-node", str(host.slots)]
        meet = ["--master-addr", request.master_addr or host_zero(request), "--master-port", str(request.port)]
        lines.append(f"# on {host.name or f'node {rank}'}")
        lines.append(shlex.join([tool("torchrun"), *place, *meet, *words]))
    return Printed(
        tuple(lines),
        (
            f"the name {request.master_addr or host_zero(request)} leads to the first node from every node; "
            f"port {request.port} is open there",
            SAME,
            SHARED,
            "torchrun returns 1 also for a run that was stopped and saved (75)",
        ),
    )


def print_mpirun(request: Request) -> Printed:
    """`mpirun` of Open MPI."""
    words = ["mpirun", "-np", str(request.world_size), "--bind-to", "none"]
    if request.hostfile is not None:
        words += ["--hostfile", str(request.hostfile), "--map-by", "slot"]
    if len(request.hosts) > 1:
        words += ["-x", f"MASTER_ADDR={request.master_addr or host_zero(request)}", "-x", f"MASTER_PORT={request.port}"]
    elif request.hostfile is None:
        words.append("--oversubscribe")  # ranks are not counted against cores
    for name in request.exports if len(request.hosts) > 1 else ():
        words += ["-x", name] if name in os.environ else ["-x", f"{name}={request.exports[name]}"]
    assumed = ["Open MPI (others take -hosts and -genv for --hostfile and -x); as root also --allow-run-as-root"]
    if len(request.hosts) > 1:
        assumed += ["ssh without a password, or mpirun in an allocation", SAME, SHARED, f"port {request.port} open"]
    return Printed((shlex.join([*words, tool("python"), "-m", MODULE, *request.arguments]),), tuple(assumed))


def print_slurm(request: Request) -> Printed:
    """`sbatch launch/cluster/slurm.sh`."""
    gpus = _even_slots(request, "slurm")
    words = ["sbatch", "--nodes", str(len(request.hosts)), "--ntasks-per-node", str(gpus), "--gpus-per-node", str(gpus)]
    return Printed(
        (shlex.join([*words, str(FILES / "slurm.sh"), *request.arguments]),),
        (
            f"--gpus-per-node {gpus}: on nodes without GPUs leave it out",
            "enough cores: --exclusive, or --cpus-per-task (SLURM gives a task one core)",
            f"{tool('python')} exists on every node: activate its environment before sbatch",
            "--run_dir is given: the requeued job continues there (--resume auto is added by the file)",
            "a partition, account and --time as your site wants them (further options of sbatch)",
            SAME,
            SHARED,
        ),
    )


def print_kubernetes(request: Request) -> Printed:
    """`kubectl apply -f launch/cluster/kubernetes.yaml`."""
    gpus = _even_slots(request, "kubernetes")
    return Printed(
        (
            f"# in {FILES / 'kubernetes.yaml'}:",
            f"#   completions, parallelism: {len(request.hosts)}",
            f'#   NODES: "{len(request.hosts)}"   RANKS: "{gpus}"   nvidia.com/gpu: {gpus}',
            f"#   args: {list(request.arguments)}".replace("'", '"'),
            f"kubectl apply -f {shlex.quote(str(FILES / 'kubernetes.yaml'))}",
        ),
        (
            "an image made by `docker build -f launch/cluster/container/Dockerfile -t NAME .`, pushed where the nodes find it",
            "a volume claim `bitfleet` for the data and --run_dir that all pods may write (ReadWriteMany)",
            "Kubernetes 1.31 or newer (podFailurePolicy)",
        ),
    )


PRINTERS = {
    "deepspeed": print_deepspeed,
    "slurm": print_slurm,
    "torchrun": print_torchrun,
    "mpirun": print_mpirun,
    "kubernetes": print_kubernetes,
}


def host_zero(request: Request) -> str:
    """The name of the machine of rank 0.

    Raises:
        ValueError: nobody said it.
    """
    if not request.hosts[0].name:
        raise ValueError(
            "on several nodes the ranks meet at the first one: pass --hostfile, or --master_addr with its name"
        )
    return request.hosts[0].name


def _even_slots(request: Request, launcher: str) -> int:
    slots: Sequence[int] = sorted({host.slots for host in request.hosts})
    if len(slots) > 1:
        raise ValueError(
            f"{launcher} starts equally many ranks on every node, but the hostfile has {slots[0]} and {slots[-1]} slots"
        )
    return slots[0]
