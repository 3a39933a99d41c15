"""Write the command of each launcher for one run, and what it assumes.

DeepSpeed takes along environment variables that start with PYTHON, UCX, MV2 or MLFLOW (and NCCL if
the launching machine has a GPU), and the lines of ~/.deepspeed_env and ./.deepspeed_env, or of the
file that DS_ENV_FILE names; nothing else. So bitfleet writes such a file.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from bitfleet.launch.cluster.hosts import Host
from bitfleet.launch.cluster.places import DEFAULT_PORT

MODULE = "bitfleet.launch.train"
FILES = Path(__file__).parent
SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
"""ssh never asks for a password, and gives up a machine that has not answered for 30 s."""
EXPORTED_PREFIXES = tuple(
    "BITFLEET_ NCCL_ GLOO_ TORCH_ OMP_ MKL_ KMP_ GOMP_ MALLOC_ DALI_ CUDA_DEVICE_ CUBLAS_".split()
)
EXPORTED = tuple("DS_ACCELERATOR DEEPSPEED_TIMEOUT LD_LIBRARY_PATH LD_PRELOAD CUDA_HOME".split())
NOT_EXPORTED = ("BITFLEET_ALONE",)
SAME = "the same bitfleet, Python environment, data and working folder under the same paths on every node"
SHARED = "--run_dir on a file system that all nodes share"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A run to start."""

    hosts: tuple[Host, ...]
    """The machines; names are "" if unknown."""
    arguments: tuple[str, ...]
    """Arguments of launch/train.py."""
    hostfile: Path | None = None
    master_addr: str | None = None
    master_port: int | None = None
    node_rank: int | None = None
    """Number of this machine, with --no_ssh."""
    remote: bool = False
    """The only host is another machine."""
    visible_devices: bool = False
    """CUDA_VISIBLE_DEVICES names a device per rank, which DeepSpeed heeds only without a number of
    ranks."""
    exports: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables that ranks on other machines need."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(host.slots for host in self.hosts)

    @property
    def by_ssh(self) -> bool:
        """DeepSpeed starts ranks on other machines."""
        return self.node_rank is None and (len(self.hosts) > 1 or self.remote)

    @property
    def port(self) -> int:
        """Port on which rank 0 listens."""
        return self.master_port or DEFAULT_PORT


@dataclasses.dataclass(frozen=True, slots=True)
class Printed:
    """Lines for a shell, and what they assume."""

    lines: tuple[str, ...]
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self.lines, "", "It assumes:", *(f"  - {assumption}" for assumption in self.assumptions)])


def tool(name: str) -> str:
    """Return the path of a command of this Python environment, relative if it is below the working
    folder, as .venv is; the one on PATH if it is not next to Python (`pip install --user`)."""
    path = Path(sys.executable) if name == "python" else Path(sys.executable).with_name(name)
    if not path.exists():
        path = Path(shutil.which(name) or path)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def deepspeed_words(request: Request) -> list[str]:
    """Return DeepSpeed's command."""
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
    arguments = [pdsh_argument(argument) for argument in request.arguments] if request.by_ssh else request.arguments
    return [*words, "--module", MODULE, *arguments]


def pdsh_argument(argument: str) -> str:
    """Quote `argument` for DeepSpeed (which puts quotes around words with a space), pdsh (%) and
    the remote shell."""
    argument = argument.replace("%", "%%")
    if " " in argument:
        for character in ("\\", "$", "`"):
            argument = argument.replace(character, "\\" + character)
        return argument
    return shlex.quote(argument)


def print_deepspeed(request: Request) -> Printed:
    """Print `deepspeed`: here, over ssh, or on each node by --no_ssh."""
    command = shlex.join(deepspeed_words(request))
    if not request.by_ssh and request.node_rank is None:
        host = f" ({request.hosts[0].name})" if request.hosts[0].name else ""
        return Printed((command,), (f"{_ranks(request)} on this machine{host}, one per GPU if there are GPUs",))
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
        else f"the first address of `hostname -I` on {request.hosts[0].name} is the right one (else --master_addr)"
    )
    ssh = "pdsh here; ssh without a password from here to every host of the file, this machine too if it is in it"
    return Printed(tuple(lines), (ssh, SAME, SHARED, address, port))


def print_torchrun(request: Request) -> Printed:
    """Print `torchrun` for every node."""
    words = ["-m", MODULE, *request.arguments]
    if len(request.hosts) == 1:
        port = ["--master-port", str(request.master_port)] if request.master_port else ["--standalone"]
        head = [tool("torchrun"), *port, "--nproc-per-node", str(request.world_size)]
        where = request.hosts[0].name or "this machine"
        return Printed((shlex.join([*head, *words]),), (f"{_ranks(request)} on {where}",))
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
    """Print `mpirun` of Open MPI."""
    words = ["mpirun", "-np", str(request.world_size), "--bind-to", "none"]
    if request.hostfile is not None:
        words += ["--hostfile", str(request.hostfile), "--map-by", "slot"]
    if len(request.hosts) > 1:
        words += ["-x", f"MASTER_ADDR={request.master_addr or host_zero(request)}", "-x", f"MASTER_PORT={request.port}"]
    elif request.master_port:
        words += ["-x", f"MASTER_PORT={request.master_port}"]
    if len(request.hosts) == 1 and request.hostfile is None:
        words.append("--oversubscribe")  # ranks are not counted against cores
    for name in request.exports if len(request.hosts) > 1 else ():
        words += ["-x", name] if name in os.environ else ["-x", f"{name}={request.exports[name]}"]
    assumed = ["Open MPI (others take -hosts and -genv for --hostfile and -x); as root also --allow-run-as-root"]
    if len(request.hosts) > 1:
        assumed += ["ssh without a password, or mpirun in an allocation", SAME, SHARED, f"port {request.port} open"]
    return Printed((shlex.join([*words, tool("python"), "-m", MODULE, *request.arguments]),), tuple(assumed))


def print_slurm(request: Request) -> Printed:
    """Print `sbatch launch/cluster/slurm.sh`."""
    gpus = _even_slots(request, "slurm")
    words = ["sbatch", "--nodes", str(len(request.hosts)), "--ntasks-per-node", str(gpus), "--gpus-per-node", str(gpus)]
    if request.hosts[0].name:
        words += ["--nodelist", ",".join(host.name for host in request.hosts)]
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
    """Print `kubectl apply -f launch/cluster/kubernetes.yaml` and what to change in the file."""
    gpus = _even_slots(request, "kubernetes")
    continues = any(word.partition("=")[0] == "--resume" for word in request.arguments)
    arguments = [*request.arguments, *([] if continues else ["--resume", "auto"])]  # a pod that saved starts again
    elsewhere = "Kubernetes chooses the nodes, not the hostfile; nodeAffinity in the file of the job names them"
    return Printed(
        (
            f"# in {FILES / 'kubernetes.yaml'}:",
            f"#   completions, parallelism: {len(request.hosts)}",
            f'#   NODES: "{len(request.hosts)}"   RANKS: "{gpus}"   nvidia.com/gpu: {gpus}',
            f"#   args: {json.dumps(arguments)}",
            f"kubectl apply -f {shlex.quote(str(FILES / 'kubernetes.yaml'))}",
        ),
        (
            "an image of `docker build -f launch/cluster/container/Dockerfile -t NAME .`, pushed to a registry",
            "a volume claim `bitfleet` for the data and --run_dir that all pods may write (ReadWriteMany)",
            "Kubernetes 1.31 or newer (podFailurePolicy)",
            *([elsewhere] if request.hosts[0].name else []),
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
    """Return the name of the machine of rank 0.

    Raises:
        ValueError: it is unknown.
    """
    if not request.hosts[0].name:
        raise ValueError(
            "on several nodes the ranks meet at the first one: pass --hostfile, or --master_addr with its name"
        )
    return request.hosts[0].name


def _ranks(request: Request) -> str:
    return f"{request.world_size} rank{'s' * (request.world_size > 1)}"


def _even_slots(request: Request, launcher: str) -> int:
    slots = sorted({host.slots for host in request.hosts})
    if len(slots) > 1:
        raise ValueError(
            f"{launcher} starts the same number of ranks on every node, but the hostfile has {slots[0]} and {slots[-1]}"
        )
    return slots[0]


def traveling(environ: Mapping[str, str], device: str) -> dict[str, str]:
    """Return the variables of `environ` that ranks on other machines need too.

    Args:
        environ: the launching shell's.
        device: "auto", "cpu" or "gpu"; DeepSpeed is told of "cpu", or it warns on every rank.

    Raises:
        ValueError: a value has several lines, which a file of lines cannot hold.
    """
    exports = {
        name: value
        for name, value in sorted(environ.items())
        if (name.startswith(EXPORTED_PREFIXES) or name in EXPORTED) and name not in NOT_EXPORTED
    }
    if device == "cpu":
        exports.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in exports.items():
        if "\n" in value:
            raise ValueError(
                f"the environment variable {name} has several lines, which cannot travel to other machines: unset it"
            )
    return exports


def deepspeed_line(name: str, value: str) -> str:
    """Return `NAME=VALUE` for DeepSpeed's file; DeepSpeed puts double quotes around values with
    special characters."""
    if re.search(r"[^\w@%+=:,./-]", value):
        value = re.sub(r'([\\"$`])', r"\\\1", value)
    return f"{name}={value}"


def users_lines(folders: tuple[Path, ...]) -> list[str]:
    """Return the lines of the user's .deepspeed_env in `folders`; later ones win.

    Raises:
        ValueError: a line without "=", over which DeepSpeed fails.
    """
    lines = []
    for path in (folder / ".deepspeed_env" for folder in folders):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not re.match(r"\s*\w+\s*=", line):
                raise ValueError(
                    f"{path}, line {number}: DeepSpeed reads only lines NAME=VALUE, not {line!r}: remove it"
                )
            lines.append(line)
    return lines
