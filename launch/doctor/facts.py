"""Collect what a rank knows about its machine and its installation, without judging it."""

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import sysconfig
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from bitfleet.launch.data.readable import Readable, readable
from bitfleet.launch.job import same_on_all_hosts
from bitfleet.models import check_images
from bitfleet.optim.kernels.kernels import bop2ndorder_bits_, kernel_library
from bitfleet.trainer.checkpoint.run_folder import checkpoint_disk, planned_folder
from bitfleet.trainer.config import TrainConfig, resolve_replicas
from bitfleet.trainer.data import check_classes, open_dataset
from bitfleet.trainer.data.cache import cache_folder
from bitfleet.trainer.engine.arithmetic import remark_on_precision
from bitfleet.trainer.ranks.collectives import Ranks, nccl_version
from bitfleet.trainer.run.versions import DALI_WHEELS, PACKAGES, git_revision, version

KERNEL_WEIGHTS = 4096


class ReadableTeacher(NamedTuple):
    """A run's teacher, or the cache of its logits, as a rank finds it."""

    problem: str = ""
    """Sentence about why it cannot be used; "" if it can."""
    sha: str = ""
    """sha256 of its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts of one rank. Sizes are bytes; None stands for what does not exist or cannot be found
    out."""

    rank: int
    local_world_size: int
    host: str
    versions: dict[str, str]
    """Versions of Python, the C library and packages."""
    git: str | None
    dali: dict[str, str]
    """Installed wheels of DALI and their versions."""
    torch_cuda: str | None
    """CUDA that torch was built for."""
    nvidia_driver: bool
    """The machine has NVIDIA's kernel driver."""
    cxx11_abi: bool
    nccl: str | None
    devices: list[str]
    num_machine_cores: int
    cores: list[int]
    """Cores that this rank may use."""
    num_threads: int
    free_memory: int
    free_run: int | None
    """Free space where runs are written; None: not writable."""
    run_folder: str
    free_cache: int | None
    """Free space in the cache folder; None: not writable."""
    cache_folder: str
    shm: int | None
    """Size of /dev/shm."""
    open_files: int
    """Soft limit of open files."""
    compiler: str | None
    """C++ compiler that torch.compile finds."""
    kernels: str | None
    """Reason why the kernels of optim/kernels are not built; None: they are."""
    c_compiler: str | None
    """C compiler that Triton finds."""
    python_header: bool
    """Python.h is where Triton looks for it."""
    gpu_kernel: str | None
    """Defect of the update of binary weights on this rank's GPU; "" for none, None without a
    GPU."""
    config: str | None = None
    """sha256 of the configuration, without what may differ between hosts; None without one."""
    data: Readable | None = None
    """Set with a configuration."""
    model: str | None = None
    """Reason why the configured network cannot train on that data; "" if it can, None without a
    configuration."""
    precision: str = ""
    """Remark on the configured precision; "" for none."""
    teacher: ReadableTeacher | None = None
    """Set with a configuration that has one."""


def collect_facts(config: TrainConfig | None, ranks: Ranks, device: torch.device) -> Facts:
    """Return the facts about this rank and its device, and with a configuration about its data."""
    run_folder = checkpoint_disk(
        planned_folder(config.output / config.name, config.run_dir, config.resume) if config else Path("runs")
    )
    cache, free_cache = _cache()
    data = readable(config.data) if config else None
    return Facts(
        rank=ranks.rank,
        local_world_size=ranks.local_world_size,
        host=socket.gethostname(),
        versions=_versions(),
        git=git_revision(),
        dali={wheel: installed for wheel in DALI_WHEELS if (installed := version(wheel))},
        torch_cuda=torch.version.cuda,
        nvidia_driver=Path("/proc/driver/nvidia/version").exists(),
        cxx11_abi=torch.compiled_with_cxx11_abi(),
        nccl=nccl_version(),
        devices=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        num_machine_cores=os.cpu_count() or 1,
        cores=sorted(os.sched_getaffinity(0)),
        num_threads=torch.get_num_threads(),
        free_memory=free_memory(),
        free_run=free_where_writable(run_folder),
        run_folder=str(run_folder),
        free_cache=free_cache,
        cache_folder=cache,
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        compiler=shutil.which(os.environ.get("CXX") or "g++"),
        kernels=_kernels(),
        c_compiler=shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang"),
        python_header=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        gpu_kernel=compare_kernel(device) if device.type == "cuda" else None,
        config=_sha256(same_on_all_hosts(config)) if config else None,
        data=data,
        model=_model(config, ranks, data) if config and data else None,
        precision=remark_on_precision(config.engine.precision, device.type) if config else "",
        teacher=_teacher(config, ranks, device) if config and config.distill.teacher else None,
    )


def _sha256(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _model(config: TrainConfig, ranks: Ranks, data: Readable) -> str:
    try:
        num_replicas = resolve_replicas(config, ranks.world_size)
        check_images(config.model, config.data.image_size, config.global_batch_size // num_replicas)
        if not data.problem:
            check_classes(open_dataset(config.data), config.model.num_classes, config.data.root)
    except ValueError as error:
        return str(error)
    return ""


def _teacher(config: TrainConfig, ranks: Ranks, device: torch.device) -> ReadableTeacher:
    from bitfleet.trainer.trainer import open_teacher

    try:
        num_replicas = resolve_replicas(config, ranks.world_size)
        return ReadableTeacher(sha=open_teacher(config, open_dataset(config.data), num_replicas, device).weights_sha256)
    except ValueError as error:
        return ReadableTeacher(problem=str(error))


def _versions() -> dict[str, str]:
    python = {"python": platform.python_version(), "C library": " ".join(platform.libc_ver())}
    return python | {package: version(package) or "not installed" for package in PACKAGES}


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the free memory of the machine, or what the container's limit leaves (cgroup v2);
    files in the page cache count as free."""
    free: int = psutil.virtual_memory().available
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(counts["inactive_file"]) + int(counts["active_file"])
    except (OSError, ValueError, KeyError):
        return free
    return free if limit == "max" else min(free, int(limit) - used + cached)


def free_where_writable(folder: Path) -> int | None:
    """Return the bytes free for files in `folder`; None if none can be made, which permissions do
    not tell root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free
    except OSError:
        return None


def _cache() -> tuple[str, int | None]:
    try:
        folder = cache_folder()
    except ValueError as error:
        return str(error), None
    return str(folder), shutil.disk_usage(folder).free


def _kernels() -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kernel_library() is not None:
            return None
    return str(caught[-1].message) if caught else "they could not be built"


def compare_kernel(device: torch.device) -> str:
    """Build the update of binary weights for `device`, and compare its bits with the CPU's; return
    a defect, "" for none."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(256, (KERNEL_WEIGHTS // 8,), generator=generator, dtype=torch.uint8)
    grad, exp_avg = torch.randn(2, KERNEL_WEIGHTS, generator=generator).unbind()
    expected = [bits, grad, exp_avg, grad.square()]
    computed = [tensor.to(device, copy=True) for tensor in expected]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for tensors in (expected, computed):
                bop2ndorder_bits_(*tensors, gamma=1e-1, sigma=1e-2, threshold=1e-1, correction="none", step=1)
            equal = all(torch.equal(a.cpu(), b) for a, b in zip(computed, expected, strict=True))
        except Exception as error:  # of a compiler, a driver or a library: whatever is wrong with the installation
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    if slow := [str(warning.message) for warning in caught if warning.category is RuntimeWarning]:
        return slow[0]
    return "" if equal else "its bits are not those of the CPU"
