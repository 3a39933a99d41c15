"""Place of this process among the ranks, and the few collectives that training itself needs."""

import ctypes
import dataclasses
import datetime
import functools
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from bitfleet.optim.sharding.reduction import all_gather_single

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)
_timeout = COLLECTIVE_TIMEOUT
_job_word: str | None = None
SAVE_TIMEOUT = datetime.timedelta(minutes=30)
"""Timeout of saves: a rank must not give up before a slower one has written a large checkpoint to a
slow disk."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """Position of this process: `rank` of `world_size` in the job, `local_rank` of
    `local_world_size` on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str = "127.0.0.1"
    """Address on which rank 0 listens."""
    master_port: int = 0
    launched: bool = False
    """A launcher started this process; the end of the launcher is a request to stop."""
    hosts: tuple[str, ...] = ()
    """Host of every rank; empty for a single rank."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints, and writes everything that is not sharded."""
        return self.rank == 0


def choose_device(wanted: str, ranks: Ranks) -> torch.device:
    """Return the device of this rank; `wanted` is "auto", "cpu" or "gpu".

    Raises:
        ValueError: "gpu" without CUDA, or more ranks than GPUs.
    """
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ValueError('device is "gpu", but torch finds no CUDA device here: use --device cpu or auto')
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1:  # srun --gpus-per-task=1 shows each rank one GPU, as number 0
        return torch.device("cuda", 0)
    if ranks.local_rank >= num_gpus:
        raise ValueError(
            f"rank {ranks.rank} is number {ranks.local_rank} on its machine, where torch finds {num_gpus} GPUs: "
            f"start at most {num_gpus} ranks there"
        )
    return torch.device("cuda", ranks.local_rank)


def gpu_uuid(device: torch.device) -> str:
    """Return the UUID of a GPU, the same in all processes and under any device number; "" for a
    CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def use_device(device: torch.device, ranks: Ranks, num_threads: int | None = None) -> None:
    """Make `device` current and set the threads: `num_threads`, or this rank's share of the cores
    of the machine."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    torch.set_num_threads(num_threads or max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor, as CUDA's allocator does.

    glibc returns large blocks to the system at once, and the next one is filled page by page: that
    was 45 % of a training step of XNOR-Net on a CPU (docs/sharding.md). Other C libraries stay as
    they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


@contextmanager
def process_group(
    device: torch.device,
    ranks: Ranks,
    timeout: datetime.timedelta = COLLECTIVE_TIMEOUT,
    store: Store | None = None,
) -> Iterator[None]:
    """Create the default process group (NCCL on CUDA, else gloo), and destroy it at the end of the
    block.

    A process that failed must not wait for its peers, so on an exception the group is left to the
    end of the process.

    NCCL's watchdog looks ten times a second and by default aborts the process when a peer is gone,
    before the heartbeat has said which host that was. Here it only ends the communicators, so that
    the next collective raises: the heartbeat ends the process.

    Args:
        device: where the model runs.
        ranks: this process's place.
        timeout: after which a collective fails, here and in `cpu_group`.
        store: where the ranks have met; None: at MASTER_ADDR and MASTER_PORT.
    """
    global _timeout, _job_word
    _timeout = timeout
    if device.type == "cuda":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")  # CleanUpOnly, of ProcessGroupNCCL.hpp
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        store=None if store is None else PrefixStore("group", store),
    )
    if ranks.world_size > 1:
        _job_word = broadcast_object(secrets.token_hex(8), cpu_group("control"))
    yield
    _job_word = None
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def group_of_one() -> Iterator[Ranks]:
    """Create the default process group of a process that is alone, on the CPU; gives its place."""
    ranks = Ranks(0, 1, 0, 1)
    with process_group(torch.device("cpu"), ranks, store=dist.HashStore()):  # type: ignore[attr-defined]
        yield ranks


def connect(device: torch.device) -> None:
    """Connect the ranks by NCCL, each with its GPU; on a CPU they are connected already. Every rank
    calls this.

    `init_process_group(device_id=device)` ends with the same. Here it comes after the ranks have
    agreed: those that differ in versions or device would hang in it.
    """
    if device.type != "cuda":
        return
    group = dist.group.WORLD
    assert group is not None
    group.bound_device_id = device
    group._get_backend(device).eager_connect_single_device(device)


def job_word() -> str | None:
    """Return a random word that the ranks of this job share, to find each other on a machine; None
    for a single rank."""
    return _job_word


def barrier() -> None:
    """Wait until every rank calls this."""
    dist.barrier()


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over the ranks, and return it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_tensors(tensor: Tensor) -> list[Tensor]:
    """Return `tensor` (flat) of every rank, in the order of ranks."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return [tensor]
    everyone = tensor.new_empty(world_size * tensor.numel())
    all_gather_single(everyone, tensor)
    return list(everyone.view(world_size, -1))


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Return `value` of rank 0 on every rank (pickled: strings and numbers only)."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return `value` of every rank, in the order of ranks (pickled: strings and numbers only)."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def all_gather_hosts() -> tuple[str, ...]:
    """Return the host name of every rank, in the order of ranks."""
    return tuple(all_gather_objects(socket.gethostname(), cpu_group("control")))


def all_reduce_number(value: int) -> int:
    """Return the sum of `value` over the ranks."""
    return sum(all_gather_objects(value))


def all_gather_numbers(value: float) -> list[float]:
    """Return `value` of every rank, in the order of ranks, without waiting for a GPU."""
    if dist.get_world_size() == 1:
        return [value]
    everyone = [torch.zeros((), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, torch.tensor(value, dtype=torch.float64), group=cpu_group("control"))
    return [float(each) for each in everyone]


def nccl_version() -> str | None:
    """Return the version of the NCCL that torch was built with; None without one."""
    if not dist.is_nccl_available():
        return None
    version: Any = torch.cuda.nccl.version()
    return ".".join(map(str, version))


def send(tensor: Tensor, peer: int) -> None:
    """Send `tensor` to rank `peer`, which calls `receive`; returns when it may be written again."""
    dist.send(tensor, peer)
    _finish(tensor)


def receive(tensor: Tensor, peer: int) -> Tensor:
    """Fill `tensor` with what rank `peer` sends, and return it."""
    dist.recv(tensor, peer)
    _finish(tensor)
    return tensor


def _finish(tensor: Tensor) -> None:
    if tensor.is_cuda:  # NCCL returns before anything has happened
        torch.cuda.synchronize(tensor.device)


def cpu_group(name: str, timeout: datetime.timedelta | None = None) -> dist.ProcessGroup:
    """Return a gloo group of all ranks, one per `name`: threads that share a group would mix up
    each other's collectives.

    Every rank asks for the same groups in the same order. `timeout` None: that of the process
    group.
    """
    return _cpu_group(name, timeout or _timeout, dist.group.WORLD)


@functools.lru_cache(maxsize=4)
def _cpu_group(name: str, timeout: datetime.timedelta, _: object) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """Return the elementwise maximum over the ranks, without waiting for a GPU."""
    if dist.get_world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=cpu_group("control"))
    return [int(value) for value in tensor.tolist()]


def is_lost_peer(error: BaseException) -> bool:
    """Return True if a collective raised `error` because another rank is gone or hangs."""
    gone = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "Socket closed",
    )
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in gone)
    )
