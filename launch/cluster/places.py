"""Find the rank of this process in the environment of the launcher that started it.

    launcher    known by                            its documentation
    torchrun    TORCHELASTIC_RUN_ID                 docs.pytorch.org: torchrun
    deepspeed   CROSS_RANK, LOCAL_SIZE              deepspeed/launcher/launch.py
    mpirun      OMPI_COMM_WORLD_RANK (Open MPI)     ompi: mpirun(1), "Environment variables"
                PMI_RANK and MPI_LOCALRANKID        MPICH's and Intel MPI's Hydra
                PMI_RANK and PMI_LOCAL_RANK         Cray's PALS
    srun        SLURM_STEP_ID and SLURM_PROCID      srun(1), "OUTPUT ENVIRONMENT VARIABLES"
    kubernetes  JOB_COMPLETION_INDEX, WORLD_SIZE    "Indexed Job", one process per pod
    by hand     RANK                                torch.distributed, "Environment variable ..."
    alone       none of these

The first one found counts: torchrun in an srun step is torchrun, mpirun in an allocation is mpirun.
What the user sets (MASTER_ADDR, MASTER_PORT, LOCAL_RANK, LOCAL_WORLD_SIZE) wins; RANK and
WORLD_SIZE next to a launcher's variables must equal them.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping

DEFAULT_PORT = 29500
"""Default of torch and DeepSpeed."""
FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""Range of computed ports, below those that Linux gives to clients (32768 to 60999)."""
LOOPBACK = "127.0.0.1"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Position of a process in its job."""

    launcher: str
    """torchrun, deepspeed, mpirun, srun, kubernetes, "by hand" or "alone"."""
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    """Machine on which rank 0 listens."""
    master_port: int | None
    """None for a rank alone: any free port."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Started:
    """Variables of a launcher; None if unset."""

    launcher: str
    rank: tuple[str, int]
    """Name of the variable, and its value."""
    world_size: tuple[str, int]
    local_rank: int | None = None
    local_world_size: int | None = None
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT


def place_from(environ: Mapping[str, str]) -> Place:
    """Return the place of the process with the environment `environ`.

    Raises:
        ValueError: a variable is missing, is not a number, or contradicts another one.
    """
    started = _started(environ)
    if started is None:
        return Place("alone", 0, 1, 0, 1, LOOPBACK, None)
    (rank_name, rank), (size_name, world_size) = started.rank, started.world_size
    _same(environ, "RANK", rank_name, rank, started.launcher)
    _same(environ, "WORLD_SIZE", size_name, world_size, started.launcher)
    _within(rank_name, rank, size_name, world_size)
    local_rank, local_size = _local_place(environ, started)
    _within("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size)
    if local_size > world_size:
        raise ValueError(
            f"LOCAL_WORLD_SIZE is {local_size}, but there are {world_size} ranks ({size_name}): "
            f"it counts the ranks of one machine"
        )
    if started.launcher == "srun":
        _reject_idle_gpus(environ, local_size)
    alone = world_size == 1 and "MASTER_PORT" not in environ
    address = environ.get("MASTER_ADDR") or (LOOPBACK if local_size == world_size else started.master_addr)
    if not address:
        raise ValueError(
            f"{rank_name} is {rank} of {world_size} ranks on more than one machine, but MASTER_ADDR is not set: set "
            f"it to the name or address of the machine of rank 0, the same on every rank"
            + (" (mpirun -x MASTER_ADDR=node1)" if started.launcher == "mpirun" else "")
        )
    port = None if alone else _port(environ, started.master_port)
    return Place(started.launcher, rank, world_size, local_rank, local_size, address, port)


def rank_of(environ: Mapping[str, str]) -> int:
    """Return the rank if it can be told, else a guess or 0, to decide which process prints; never
    raise."""
    try:
        return place_from(environ).rank
    except ValueError:
        names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
        return max(int(value) if (value := environ.get(name, "")).isdecimal() else 0 for name in names)


def _started(environ: Mapping[str, str]) -> _Started | None:
    if "TORCHELASTIC_RUN_ID" in environ:
        return _by_variables(environ, "torchrun", "LOCAL_WORLD_SIZE")
    if "CROSS_RANK" in environ and "LOCAL_SIZE" in environ:
        return _by_variables(environ, "deepspeed", "LOCAL_SIZE")
    if "OMPI_COMM_WORLD_RANK" in environ:
        names = (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
        return _by_mpi(environ, *names)
    if "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:
        return _by_mpi(environ, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _by_srun(environ)
    if "PMI_RANK" in environ:
        return _by_mpi(environ, "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
    if "JOB_COMPLETION_INDEX" in environ and "WORLD_SIZE" in environ and "RANK" not in environ:
        index, size = _number(environ, "JOB_COMPLETION_INDEX"), _number(environ, "WORLD_SIZE")
        return _Started("kubernetes", ("JOB_COMPLETION_INDEX", index), ("WORLD_SIZE", size), 0, 1)
    if "RANK" in environ or environ.get("WORLD_SIZE", "1") != "1":
        return _by_variables(environ, "by hand", "LOCAL_WORLD_SIZE")
    return None


def _by_variables(environ: Mapping[str, str], launcher: str, local_size: str) -> _Started:
    """Read RANK and WORLD_SIZE."""
    return _Started(
        launcher,
        ("RANK", _number(environ, "RANK")),
        ("WORLD_SIZE", _number(environ, "WORLD_SIZE")),
        _optional(environ, "LOCAL_RANK"),
        _optional(environ, local_size),
    )


def _by_mpi(environ: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> _Started:
    job = environ.get("PMIX_NAMESPACE") or environ.get("PMI_JOBID")  # the same on all ranks of an mpirun
    return _Started(
        "mpirun",
        (rank, _number(environ, rank)),
        (size, _number(environ, size)),
        _number(environ, local_rank),
        _optional(environ, local_size),
        master_port=_port_of(job) if job else DEFAULT_PORT,
    )


def _by_srun(environ: Mapping[str, str]) -> _Started:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE")
    local_size = (
        tasks_of_node(per_node, _optional(environ, "SLURM_NODEID") or 0)
        if per_node
        else _optional(environ, "SLURM_NTASKS_PER_NODE")
    )
    return _Started(
        "srun",
        ("SLURM_PROCID", _number(environ, "SLURM_PROCID")),
        (size_name, _number(environ, size_name)),
        _number(environ, "SLURM_LOCALID"),
        local_size,
        # The address where srun runs is that of rank 0 only when srun was called on the first node.
        first_host(nodes) if nodes else environ.get("SLURM_LAUNCH_NODE_IPADDR"),
        _port_of(f"{environ.get('SLURM_JOB_ID', '0')}.{environ['SLURM_STEP_ID']}"),
    )


def _local_place(environ: Mapping[str, str], started: _Started) -> tuple[int, int]:
    """Return rank and number of ranks on this machine; if unset one per machine, and all for a
    loopback address."""
    rank, size = _optional(environ, "LOCAL_RANK"), _optional(environ, "LOCAL_WORLD_SIZE")
    rank = started.local_rank if rank is None else rank
    size = started.local_world_size if size is None else size
    world_size = started.world_size[1]
    if size is None and started.launcher != "by hand":
        if environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) not in (None, "1"):
            raise ValueError(
                "srun does not set SLURM_STEP_TASKS_PER_NODE, the tasks per node: pass --ntasks-per-node to srun"
            )
        size = world_size
    here = environ.get("MASTER_ADDR") in ("localhost", LOOPBACK, "::1")
    if rank is None:
        rank = started.rank[1] if here or size == world_size else 0
    if size is None:
        size = world_size if here or rank else 1
    return rank, size


def _reject_idle_gpus(environ: Mapping[str, str], local_size: int) -> None:
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if "LOCAL_WORLD_SIZE" not in environ and gpus.isdecimal() and int(gpus) > local_size:
        raise ValueError(
            f"srun started {local_size} task(s) on a node with {gpus} GPUs (SLURM_GPUS_ON_NODE), but a GPU needs a "
            f"rank: pass --ntasks-per-node={gpus} to srun, or fewer GPUs (or set LOCAL_WORLD_SIZE={local_size} to say "
            "that it is intended)"
        )


def _same(environ: Mapping[str, str], name: str, source: str, value: int, launcher: str) -> None:
    if name in environ and name != source and _number(environ, name) != value:
        raise ValueError(
            f"{name} is {environ[name]}, but {launcher} says {value} ({source}): unset {name}; only MASTER_ADDR, "
            f"MASTER_PORT, LOCAL_RANK and LOCAL_WORLD_SIZE may be set under {launcher}"
        )


def _within(name: str, rank: int, size_name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{size_name} is {size}, but a job has at least one rank")
    if rank >= size:
        raise ValueError(f"{name} is {rank}, but {size_name} is {size}: ranks are numbered 0 to {size - 1}")


def _number(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        other = {"RANK": "WORLD_SIZE", "WORLD_SIZE": "RANK"}.get(name, "")
        because = f"{other} is {environ[other]}, but " if other in environ else ""
        raise ValueError(
            f"{because}{name} is not set: start the ranks with a launcher, or set RANK, WORLD_SIZE, LOCAL_RANK"
        )
    if not environ[name].isdecimal():
        raise ValueError(f"{name} must be a number, 0 or more, not {environ[name]!r}")
    return int(environ[name])


def _optional(environ: Mapping[str, str], name: str) -> int | None:
    return _number(environ, name) if environ.get(name) else None


def _port(environ: Mapping[str, str], default: int) -> int:
    if not environ.get("MASTER_PORT"):
        return default
    port = environ["MASTER_PORT"]
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"MASTER_PORT must be a number from 1 to 65535, not {port!r}")
    return int(port)


def _port_of(job: str) -> int:
    """Return a port that is the same on all ranks of a job, and seldom that of another job on the
    machine."""
    return FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's list: "gpu003" of "gpu[003-007,9],login1".

    Raises:
        ValueError: the list does not start with a host.
    """
    match = re.match(r"(?P<head>[^\s\[\],]*)(?:\[(?P<first>[0-9]+)[^\]]*\])?(?P<tail>[^\s\[\],]*)", nodes)
    host = match["head"] + (match["first"] or "") + match["tail"] if match else ""
    if not host or (match and "[" in nodes[match.end() :].split(",")[0]):
        raise ValueError(
            f"cannot read the first host of SLURM's list {nodes!r}: set MASTER_ADDR to the machine of rank 0"
        )
    return host


def tasks_of_node(per_node: str, node: int) -> int:
    """Return the tasks of node number `node` in SLURM's list: "8(x3),4" has 8 on the nodes 0 to 2,
    4 on node 3.

    Raises:
        ValueError: another notation, or no such node.
    """
    counts: list[int] = []
    for part in per_node.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must look like 8(x3),4, not {per_node!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise ValueError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE {per_node!r} has {len(counts)} nodes")
    return counts[node]
