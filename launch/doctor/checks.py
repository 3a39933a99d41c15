"""Judge the facts of all ranks: one check per line of the doctor's table."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from bitfleet.launch.doctor.facts import Facts
from bitfleet.launch.text import gigabytes

GB = 1e9
LEAST_MEMORY, LITTLE_MEMORY = 0.5 * GB, 1.5 * GB
"""Bytes per rank; one of fashion_quickstart takes 1.0 GB."""
LEAST_DISK, LITTLE_DISK = 0.5 * GB, 10 * GB
LITTLE_CACHE = LITTLE_SHM = 1 * GB
LEAST_FILES, LITTLE_FILES = 256, 1024

Verdict = Literal["OK", "WARN", "FAIL"]


class Check(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    verdict: Verdict = "OK"
    advice: str = ""


def judge(name: str, value: str, advice: str, verdict: Verdict = "WARN") -> Check:
    """Return a check that is OK without advice, and `verdict` with it."""
    return Check(name, value, verdict if advice else "OK", advice)


def who(facts: Sequence[Facts]) -> str:
    """Name hosts and their ranks: "node1 (ranks 0, 1), node2 (rank 2)"."""
    hosts: dict[str, list[int]] = {}
    for rank in facts:
        hosts.setdefault(rank.host, []).append(rank.rank)
    return ", ".join(
        f"{host} (rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))})" for host, ranks in hosts.items()
    )


def by_value(facts: Sequence[Facts], value: Callable[[Facts], str]) -> str:
    """Return the value, if it is the same on all ranks; else each value with the ranks that have
    it."""
    holders: dict[str, list[Facts]] = {}
    for rank in facts:
        holders.setdefault(value(rank), []).append(rank)
    if len(holders) == 1:
        return next(iter(holders))
    return "; ".join(f"{text} on {who(ranks)}" for text, ranks in holders.items())


def same(
    name: str, facts: Sequence[Facts], value: Callable[[Facts], str], advice: str, verdict: Verdict = "FAIL"
) -> Check:
    """Check that `value` is the same on all ranks; else give `verdict` and `advice`."""
    differ = len(set(map(value, facts))) > 1
    return judge(name, by_value(facts, value), advice if differ else "", verdict)


def enough(
    name: str,
    facts: Sequence[Facts],
    value: Callable[[Facts], float],
    advice: str,
    *,
    least: float = 0,
    little: float,
    before: str = "",
    after: str = "",
    form: Callable[[float], str] = gigabytes,
) -> Check:
    """Check that `value` is not below `least` (FAIL) nor `little` (WARN) on any rank."""
    number = min(map(value, facts))
    low, high = form(number), form(max(map(value, facts)))
    values = low if low == high else f"{low} to {high}, least on {who([min(facts, key=value)])}"
    verdict: Verdict = "FAIL" if number < least else "WARN"
    return judge(name, before + values + after, advice if number < little else "", verdict)


def check_installation(facts: Sequence[Facts], wants_dali: bool) -> Iterator[Check]:
    """Check that what is installed is complete, fits together and is the same on all ranks."""
    for name in facts[0].versions:
        verdict: Verdict = "WARN" if name == "C library" else "FAIL"
        # bitfleet itself may run from a checkout.
        if name != "bitfleet" and all(rank.versions[name] == "not installed" for rank in facts):
            yield Check(name, "not installed", "FAIL", "pip install .")
        else:
            advice = "give every host the same environment"
            yield same(name, facts, lambda rank, name=name: rank.versions[name], advice, verdict)  # type: ignore[misc]
    git_advice = "check out the same revision on every host"
    yield same("git revision", facts, lambda rank: rank.git or "not a git checkout", git_advice)
    yield check_torch(facts)
    yield check_dali(facts, wants_dali)


def check_torch(facts: Sequence[Facts]) -> Check:
    """Check that torch was built with the same libraries on all ranks."""

    def build(rank: Facts) -> str:
        cuda = f"CUDA {rank.torch_cuda}" if rank.torch_cuda else "no CUDA"
        return f"{cuda}, NCCL {rank.nccl or 'none'}, C++11 ABI {'yes' if rank.cxx11_abi else 'no'}"

    check = same("torch's build", facts, build, "install the same torch on every host")
    if check.verdict == "OK" and any(rank.devices and rank.nccl is None for rank in facts):
        return check._replace(verdict="FAIL", advice="GPUs need a torch that was built with NCCL")
    return check


def check_dali(facts: Sequence[Facts], wanted: bool) -> Check:
    """Check that one wheel of DALI is installed, for torch's CUDA, the same on all ranks."""
    if missing := [rank for rank in facts if not rank.dali]:
        advice = "pip install '.[dali-cu13]' (or dali-cu12), or --data.loader torch"
        return Check("DALI", f"none on {who(missing)}", "FAIL" if wanted else "WARN", advice)
    if double := [rank for rank in facts if len(rank.dali) > 1]:
        advice = "both wheels install the same files: uninstall both, then install one"
        return Check("DALI", f"two wheels on {who(double)}", "FAIL", advice)

    def wheel(rank: Facts) -> str:
        return " ".join(*rank.dali.items())

    def fits(rank: Facts) -> bool:
        return rank.torch_cuda is None or f"cuda{rank.torch_cuda.split('.')[0]}0" in wheel(rank)

    check = same("DALI", facts, wheel, "install the same DALI on every host")
    if check.verdict == "FAIL" or all(map(fits, facts)):
        return check
    return check._replace(
        verdict="FAIL" if any(rank.devices for rank in facts) else "WARN",
        advice=f"torch is built for CUDA {facts[0].torch_cuda}: install DALI's wheel for it",
    )


def check_devices(facts: Sequence[Facts], wanted: str) -> Check:
    """Check that each rank has a GPU, or none has one; `wanted` is the run's device."""

    def devices(rank: Facts) -> str:
        counts = {name: rank.devices.count(name) for name in rank.devices}
        return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none: CPU"

    value = by_value(facts, devices)
    if wanted == "cpu":
        return Check("devices", value)
    without = [rank for rank in facts if not rank.devices]
    if broken := [rank for rank in without if rank.nvidia_driver]:
        advice = f"torch (CUDA {broken[0].torch_cuda}) finds no device despite the driver: compare with nvidia-smi"
        return Check("devices", f"none on {who(broken)}", "FAIL", advice)
    if without and (wanted == "gpu" or len(without) < len(facts)):
        advice = f"no GPU on {who(without)}: leave it out, or use --device cpu everywhere"
        return Check("devices", value, "FAIL", advice)
    # A rank may see its own GPU alone; two on one GPU do not get this far.
    if crowded := [rank for rank in facts if 1 < len(rank.devices) < rank.local_world_size]:
        return Check("devices", value, "FAIL", f"more ranks than GPUs on {who(crowded)}: start one per GPU")
    return same("devices", facts, devices, "the slowest device sets the pace of all", "WARN")


def check_cores(facts: Sequence[Facts]) -> Check:
    """Check that the threads of the ranks of each host have cores to run on."""
    value = by_value(
        facts,
        lambda rank: f"{len(rank.cores)} of {rank.num_machine_cores} cores, threads per rank: {rank.num_threads}",
    )
    for host in sorted({rank.host for rank in facts}):
        group = [rank for rank in facts if rank.host == host]
        cores = {core for rank in group for core in rank.cores}
        threads = sum(rank.num_threads for rank in group)
        if threads > len(cores):
            advice = (
                f"{len(group)} ranks of {host} have {threads} threads and {len(cores)} cores: "
                "start fewer ranks, give them more cores (srun --cpus-per-task), or --num_threads"
            )
            return Check("cores", value, "WARN", advice)
    return Check("cores", value)


def check_room(facts: Sequence[Facts], sees_run_folder: Sequence[bool]) -> Iterator[Check]:
    """Check memory, disks, /dev/shm and the limit of open files."""
    advice = "a rank of the smallest run takes 1 GB: free some, or start fewer ranks"
    yield enough("memory", facts, lambda rank: rank.free_memory / rank.local_world_size, advice,
                 least=LEAST_MEMORY, little=LITTLE_MEMORY, after=" free per rank")  # fmt: skip
    yield check_run_folder(facts, sees_run_folder)
    if denied := [rank for rank in facts if rank.free_cache is None]:
        yield Check("cache folder", f"none on {who(denied)}", "FAIL", denied[0].cache_folder)
    else:
        advice = "make room, or set BITFLEET_CACHE to a folder on another disk"
        folder = by_value(facts, lambda rank: rank.cache_folder)
        yield enough("cache folder", facts, lambda rank: rank.free_cache or 0, advice,
                     little=LITTLE_CACHE, before=f"{folder}: ", after=" free")  # fmt: skip
    # NCCL and the loaders pass data through shared memory; containers have 64 MB by default.
    if missing := [rank for rank in facts if rank.shm is None]:
        yield Check("/dev/shm", f"none on {who(missing)}", "FAIL", "mount a tmpfs at /dev/shm")
    else:
        advice = "start the container with --shm-size=8g (Kubernetes: an emptyDir of Memory)"
        yield enough("/dev/shm", facts, lambda rank: rank.shm or 0, advice, little=LITTLE_SHM)
    yield enough("open files", facts, lambda rank: rank.open_files, "raise it: ulimit -n 65536",
                 least=LEAST_FILES, little=LITTLE_FILES, form="{:,.0f}".format)  # fmt: skip


def check_run_folder(facts: Sequence[Facts], sees: Sequence[bool]) -> Check:
    """Check that runs are written to a folder that is writable, shared by all hosts, and has room
    for checkpoints."""
    if denied := [rank for rank in facts if rank.free_run is None]:
        advice = "choose another --run_dir or --output, or repair its permissions"
        return Check("run folder", f"{denied[0].run_folder} is not writable on {who(denied)}", "FAIL", advice)
    folder = by_value(facts, lambda rank: rank.run_folder)
    if blind := [rank for rank, seen in zip(facts, sees, strict=True) if not seen]:
        advice = "checkpoints need a folder that all hosts share: choose --run_dir on a shared disk"
        return Check("run folder", f"{folder}: what rank 0 writes is not seen on {who(blind)}", "FAIL", advice)
    return enough("run folder", facts, lambda rank: rank.free_run or 0, "make room for checkpoints",
                  least=LEAST_DISK, little=LITTLE_DISK, before=f"{folder}: ", after=" free")  # fmt: skip


def check_compilers(facts: Sequence[Facts]) -> Iterator[Check]:
    """Check the compilers, and the updates of binary weights that they build for CPU and GPU."""
    advice = ""
    if missing := [rank for rank in facts if rank.compiler is None]:
        advice = f"install g++ on {who(missing)}: without it the update of binary weights is slow on GPUs"
    yield judge("C++ compiler", by_value(facts, lambda rank: rank.compiler or "none"), advice)

    advice = ""
    if missing := [rank for rank in facts if rank.c_compiler is None]:
        advice = f"install gcc on {who(missing)}: without it steps are slow"
    elif missing := [rank for rank in facts if rank.devices and not rank.python_header]:
        advice = f"install python3-dev on {who(missing)}: without Python.h Triton cannot launch a kernel"
    header = {True: "Python.h", False: "no Python.h"}
    value = by_value(facts, lambda rank: f"{rank.c_compiler or 'none'}, {header[rank.python_header]}")
    yield judge("C compiler", value, advice)

    failed = [rank for rank in facts if rank.kernels is not None]
    value = by_value(facts, lambda rank: "built" if rank.kernels is None else "eager torch")
    yield judge("CPU kernels", value, f"{failed[0].kernels} on {who(failed)}" if failed else "")

    failed = [rank for rank in facts if rank.gpu_kernel]
    results = {None: "no GPU", "": "built, run, equal bits"}
    value = by_value(facts, lambda rank: results.get(rank.gpu_kernel, "not as they should be"))
    yield judge("GPU kernels", value, f"{failed[0].gpu_kernel} on {who(failed)}" if failed else "", "FAIL")


def check_data(facts: Sequence[Facts]) -> Check:
    """Check that every rank can read the first and the last image of each split of the same
    lists."""
    data = [rank.data for rank in facts if rank.data is not None]
    assert len(data) == len(facts)
    if failed := [rank for rank, readable in zip(facts, data, strict=True) if readable.problem]:
        reason = next(readable.problem for readable in data if readable.problem)
        return Check("data", f"not readable on {who(failed)}", "FAIL", reason)
    if len({readable.sha for readable in data}) > 1:
        value = by_value(facts, lambda rank: rank.data.sha[:12] if rank.data else "")
        return Check("data", f"sha256 {value}", "FAIL", "the hosts have other images below data.root: copy them again")
    value = f"{data[0].summary}, sha256 {data[0].sha[:12]}, read from every rank"
    return judge("data", value, "see quarantine.tsv next to the manifest" if data[0].num_quarantined else "")


def check_model(facts: Sequence[Facts]) -> Iterator[Check]:
    """Check that the network can train on the data, in the batches of a rank, and that the
    configured precision has instructions."""
    failed = [rank for rank in facts if rank.model]
    value = f"cannot train on {who(failed)}" if failed else "fits images, classes and batch"
    yield judge("model", value, (failed[0].model or "") if failed else "", "FAIL")
    if slow := [rank for rank in facts if rank.precision]:
        yield judge("precision", f"slow on {who(slow)}", slow[0].precision)


def check_teacher(facts: Sequence[Facts]) -> Iterator[Check]:
    """Check that every rank can use the same teacher, or its logits; nothing for a run without."""
    teachers = [rank.teacher for rank in facts if rank.teacher is not None]
    if not teachers:
        return
    if problems := [teacher.problem for teacher in teachers if teacher.problem]:
        failed = [rank for rank in facts if rank.teacher and rank.teacher.problem]
        yield Check("teacher", f"not usable on {who(failed)}", "FAIL", problems[0])
    else:
        advice = "the hosts have other weights: copy them again"
        yield same("teacher", facts, lambda rank: f"sha256 {rank.teacher.sha[:12] if rank.teacher else ''}", advice)
