"""The doctor's verdicts on machines: devices, cores, memory, disks, limits, and the data on them."""

from collections.abc import Sequence

from bitfleet.launch.doctor.facts import Facts
from bitfleet.launch.doctor.table import GB, Check, Verdict, by_value, differ, spread, who
from bitfleet.launch.text import gigabytes

LEAST_MEMORY, LITTLE_MEMORY = 0.5 * GB, 1.5 * GB
"""Of a rank. One of fashion_quickstart takes 1.0 GB."""
LEAST_DISK, LITTLE_DISK = 0.5 * GB, 10 * GB
LITTLE_CACHE = 1 * GB
LITTLE_SHM = 1 * GB
LEAST_FILES, LITTLE_FILES = 256, 1024


def check_devices(facts: Sequence[Facts], wanted: bool) -> Check:
    """Each rank has a GPU of its own, or none has one."""

    def devices(each: Facts) -> str:
        counts = {name: each.devices.count(name) for name in each.devices}
        return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none: CPU"

    value = by_value(facts, devices)
    without = [each for each in facts if not each.devices]
    if broken := [each for each in without if each.nvidia_driver]:
        advice = f"torch (CUDA {broken[0].torch_cuda}) finds no device beside the driver: compare with nvidia-smi"
        return Check("devices", f"none on {who(broken)}", "FAIL", advice)
    if without and (wanted or len(without) < len(facts)):
        return Check(
            "devices", value, "FAIL", f"no GPU on {who(without)}: leave it out, or use --device cpu everywhere"
        )
    if crowded := [each for each in facts if each.devices and each.local_world_size > len(each.devices)]:
        return Check("devices", value, "FAIL", f"more ranks than GPUs on {who(crowded)}: start one for each GPU")
    if differ(facts, devices):
        return Check("devices", value, "WARN", "the slowest device sets the pace of all")
    return Check("devices", value)


def check_cores(facts: Sequence[Facts]) -> Check:
    """The threads of the ranks of a host have cores to run on."""

    def cores(each: Facts) -> str:
        return f"{len(each.cores)} of {each.num_machine_cores} cores, threads of a rank: {each.num_threads}"

    value = by_value(facts, cores)
    for host in sorted({each.host for each in facts}):
        group = [each for each in facts if each.host == host]
        allowed = {core for each in group for core in each.cores}
        threads = sum(each.num_threads for each in group)
        if threads > len(allowed):
            advice = (
                f"{len(group)} ranks of {host} have {threads} threads and {len(allowed)} cores: "
                "start fewer ranks, give them more cores (srun --cpus-per-task), or --num_threads"
            )
            return Check("cores", value, "WARN", advice)
    return Check("cores", value)


def check_memory(facts: Sequence[Facts]) -> Check:
    """Free memory, for each rank its share."""

    def share(each: Facts) -> float:
        return each.free_memory / each.local_world_size

    value = spread(facts, share, gigabytes) + " free a rank"
    least = min(map(share, facts))
    if least < LITTLE_MEMORY:
        verdict: Verdict = "FAIL" if least < LEAST_MEMORY else "WARN"
        return Check("memory", value, verdict, "a rank of the smallest run takes 1 GB: free some, or start fewer ranks")
    return Check("memory", value)


def check_run_folder(facts: Sequence[Facts], sees: Sequence[bool]) -> Check:
    """Where runs are written: writable, shared by all hosts, with room for checkpoints."""
    if denied := [each for each in facts if each.free_run is None]:
        advice = "choose another --run_dir or --output, or mend its rights"
        return Check("run folder", f"{denied[0].run_folder} is not writable on {who(denied)}", "FAIL", advice)
    value = by_value(facts, lambda each: each.run_folder)
    if blind := [each for each, seen in zip(facts, sees, strict=True) if not seen]:
        advice = "checkpoints need a folder that all hosts share: choose --run_dir on a shared disk"
        return Check("run folder", f"{value}: what rank 0 writes is not seen on {who(blind)}", "FAIL", advice)
    value += f": {spread(facts, lambda each: each.free_run or 0, gigabytes)} free"
    least = min(each.free_run or 0 for each in facts)
    if least < LITTLE_DISK:
        return Check("run folder", value, "FAIL" if least < LEAST_DISK else "WARN", "make room for checkpoints")
    return Check("run folder", value)


def check_cache(facts: Sequence[Facts]) -> Check:
    """The cache folder of each host: writable, with some room."""
    if denied := [each for each in facts if each.free_cache is None]:
        return Check("cache folder", f"none on {who(denied)}", "FAIL", denied[0].cache_folder)
    value = f"{by_value(facts, lambda each: each.cache_folder)}: "
    value += f"{spread(facts, lambda each: each.free_cache or 0, gigabytes)} free"
    if min(each.free_cache or 0 for each in facts) < LITTLE_CACHE:
        return Check("cache folder", value, "WARN", "make room, or set BITFLEET_CACHE to a folder on another disk")
    return Check("cache folder", value)


def check_shm(facts: Sequence[Facts]) -> Check:
    """Shared memory: NCCL and the loaders pass data through it; containers have 64 MB by default."""
    if missing := [each for each in facts if each.shm is None]:
        return Check("/dev/shm", f"none on {who(missing)}", "FAIL", "mount a tmpfs at /dev/shm")
    value = spread(facts, lambda each: each.shm or 0, gigabytes)
    if min(each.shm or 0 for each in facts) < LITTLE_SHM:
        return Check(
            "/dev/shm", value, "WARN", "start the container with --shm-size=8g (Kubernetes: an emptyDir of Memory)"
        )
    return Check("/dev/shm", value)


def check_open_files(facts: Sequence[Facts]) -> Check:
    """The limit of open files: images, connections to all ranks, and libraries."""
    value = spread(facts, lambda each: each.open_files, lambda count: f"{count:,.0f}")
    least = min(each.open_files for each in facts)
    if least < LITTLE_FILES:
        return Check("open files", value, "FAIL" if least < LEAST_FILES else "WARN", "raise it: ulimit -n 65536")
    return Check("open files", value)


def check_data(facts: Sequence[Facts]) -> Check:
    """Every rank reads the first and the last image of each split of the same lists."""
    data = [each.data for each in facts if each.data is not None]
    assert len(data) == len(facts)
    if failed := [(each, found.problem) for each, found in zip(facts, data, strict=True) if found.problem]:
        return Check("data", f"not readable on {who([each for each, _ in failed])}", "FAIL", failed[0][1])
    if len({found.sha for found in data}) > 1:
        value = by_value(facts, lambda each: each.data.sha[:12] if each.data else "")
        return Check("data", f"sha256 {value}", "FAIL", "the hosts have other images below data.root: copy them anew")
    value = f"{data[0].summary}, sha256 {data[0].sha[:12]}, read from every rank"
    if data[0].num_quarantined:
        return Check("data", value, "WARN", "see quarantine.tsv beside the manifest")
    return Check("data", value)
