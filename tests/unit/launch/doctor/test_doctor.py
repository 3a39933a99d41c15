"""Every verdict of the doctor, from synthetic facts of two hosts with two ranks each."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.data.readable import Readable, readable
from bitfleet.launch.doctor import facts as doctor_facts
from bitfleet.launch.doctor.checks import Check
from bitfleet.launch.doctor.command import doctor
from bitfleet.launch.doctor.doctor import all_checks, format_checks
from bitfleet.launch.doctor.facts import (
    Facts,
    ReadableTeacher,
    collect_facts,
    compare_kernel,
    free_memory,
    free_where_writable,
)
from bitfleet.launch.doctor.network import Network, Pair, measure_network
from bitfleet.trainer.data import DataConfig
from bitfleet.trainer.ranks.collectives import Ranks

GOOD_DATA = Readable("10 training and 2 validation images", "ab" * 32, 0, "")


def healthy(rank: int) -> Facts:
    return Facts(
        rank=rank,
        local_world_size=2,
        host=f"node{rank // 2}",
        versions={"python": "3.11.7", "C library": "glibc 2.36", "bitfleet": "0.1.0", "torch": "2.14.1"},
        git="abc",
        dali={"nvidia-dali-cuda130": "2.4.0"},
        torch_cuda="13.0",
        nvidia_driver=True,
        cxx11_abi=True,
        nccl="2.30.7",
        devices=["H100", "H100"],
        num_machine_cores=8,
        cores=[0, 1, 2, 3],
        num_threads=2,
        free_memory=int(64e9),
        free_run=int(1e12),
        run_folder="/shared/runs",
        free_cache=int(1e11),
        cache_folder="/home/me/.cache/bitfleet",
        shm=int(32e9),
        open_files=65536,
        compiler="/usr/bin/g++",
        kernels=None,
        c_compiler="/usr/bin/gcc",
        python_header=True,
        gpu_kernel="",
        config="cd" * 32,
        data=GOOD_DATA,
        model="",
    )


FAST = Network([Pair(rank, 1e-4, 1e-4, 1e9) for rank in (1, 2, 3)], 1e9)


def judge(
    *changes: tuple[int, dict[str, Any]],
    network: Network = FAST,
    sees: tuple[bool, ...] = (True,) * 4,
    device: str = "auto",
    dali: bool = True,
) -> dict[str, Check]:
    facts = [healthy(rank) for rank in range(4)]
    for rank, fields in changes:
        facts[rank] = dataclasses.replace(facts[rank], **fields)
    checks = all_checks(facts, network, sees, wanted=device, wants_dali=dali)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def everywhere(**fields: Any) -> list[tuple[int, dict[str, Any]]]:
    return [(rank, fields) for rank in range(4)]


def test_healthy_ranks_pass() -> None:
    checks = judge()
    assert {check.verdict for check in checks.values()} == {"OK"}
    assert len(checks) == 24
    assert checks["devices"].value == "2 x H100"
    assert checks["data"].value == f"{GOOD_DATA.summary}, sha256 abababababab, read from every rank"


Case = tuple[str, Callable[[], dict[str, Check]], str, str]
CPU = {"devices": [], "nvidia_driver": False}
CASES: list[Case] = [
    (
        "torch",
        lambda: judge((3, {"versions": healthy(3).versions | {"torch": "2.13"}})),
        "FAIL",
        "2.14.1 on node0 (ranks 0, 1), node1 (rank 2); 2.13 on node1 (rank 3)",
    ),
    ("torch", lambda: judge(*everywhere(versions={"torch": "not installed"})), "FAIL", "not installed"),
    ("bitfleet", lambda: judge(*everywhere(versions={"bitfleet": "not installed"})), "OK", "not installed"),
    (
        "C library",
        lambda: judge((2, {"versions": healthy(2).versions | {"C library": "musl"}})),
        "WARN",
        "musl on node1 (rank 2)",
    ),
    ("git revision", lambda: judge((2, {"git": "abc-dirty"})), "FAIL", "abc-dirty on node1 (rank 2)"),
    ("git revision", lambda: judge(*everywhere(git=None)), "OK", "not a git checkout"),
    ("torch's build", lambda: judge((1, {"torch_cuda": "12.9"})), "FAIL", "CUDA 12.9, NCCL 2.30.7"),
    ("torch's build", lambda: judge(*everywhere(nccl=None)), "FAIL", "NCCL none"),
    ("DALI", lambda: judge((1, {"dali": {}})), "FAIL", "none on node0 (rank 1)"),
    ("DALI", lambda: judge((1, {"dali": {}}), dali=False), "WARN", "none on node0 (rank 1)"),
    (
        "DALI",
        lambda: judge((0, {"dali": {"nvidia-dali-cuda130": "2.4", "nvidia-dali-cuda120": "2.4"}})),
        "FAIL",
        "two wheels on node0 (rank 0)",
    ),
    ("DALI", lambda: judge((0, {"dali": {"nvidia-dali-cuda130": "2.3"}})), "FAIL", "2.3 on node0 (rank 0)"),
    ("DALI", lambda: judge(*everywhere(dali={"nvidia-dali-cuda120": "2.4"})), "FAIL", "nvidia-dali-cuda120"),
    (
        "DALI",
        lambda: judge(*everywhere(dali={"nvidia-dali-cuda120": "2.4"}, **CPU)),
        "WARN",
        "nvidia-dali-cuda120",
    ),
    ("devices", lambda: judge(*everywhere(**CPU)), "OK", "none: CPU"),
    ("devices", lambda: judge(*everywhere(**CPU), device="gpu"), "FAIL", "none: CPU"),
    ("devices", lambda: judge((2, CPU), (3, CPU)), "FAIL", "none: CPU on node1 (ranks 2, 3)"),
    ("devices", lambda: judge((2, {"devices": []})), "FAIL", "none on node1 (rank 2)"),
    ("devices", lambda: judge((2, CPU), (3, CPU), device="cpu"), "OK", "none: CPU on node1 (ranks 2, 3)"),
    ("devices", lambda: judge(*everywhere(local_world_size=3)), "FAIL", "2 x H100"),
    ("devices", lambda: judge(*everywhere(local_world_size=3), device="cpu"), "OK", "2 x H100"),
    ("devices", lambda: judge(*everywhere(devices=["H100"])), "OK", "1 x H100"),  # srun --gpus-per-task 1
    ("devices", lambda: judge((0, {"devices": ["H100", "A100"]})), "WARN", "1 x H100, 1 x A100 on node0"),
    ("cores", lambda: judge((2, {"cores": [0]}), (3, {"cores": [0]})), "WARN", "1 of 8 cores"),
    ("memory", lambda: judge((1, {"free_memory": int(2e9)})), "WARN", "1.0 GB to 32.0 GB, least on node0 (rank 1)"),
    ("memory", lambda: judge((1, {"free_memory": int(4e8)})), "FAIL", "least on node0 (rank 1)"),
    ("run folder", lambda: judge((2, {"free_run": None})), "FAIL", "not writable on node1 (rank 2)"),
    ("run folder", lambda: judge(sees=(True, True, False, False)), "FAIL", "not seen on node1 (ranks 2, 3)"),
    ("run folder", lambda: judge((2, {"free_run": int(5e9)})), "WARN", "5.0 GB to 1,000.0 GB"),
    ("run folder", lambda: judge((2, {"free_run": int(1e8)})), "FAIL", "0.1 GB to"),
    ("cache folder", lambda: judge((2, {"free_cache": None})), "FAIL", "none on node1 (rank 2)"),
    ("cache folder", lambda: judge((2, {"free_cache": int(1e8)})), "WARN", "least on node1 (rank 2)"),
    ("/dev/shm", lambda: judge((2, {"shm": None})), "FAIL", "none on node1 (rank 2)"),
    ("/dev/shm", lambda: judge((2, {"shm": int(64e6)})), "WARN", "0.1 GB to 32.0 GB"),
    ("open files", lambda: judge((2, {"open_files": 512})), "WARN", "512 to 65,536"),
    ("open files", lambda: judge((2, {"open_files": 64})), "FAIL", "64 to 65,536"),
    ("C++ compiler", lambda: judge((2, {"compiler": None})), "WARN", "none on node1 (rank 2)"),
    ("C compiler", lambda: judge((2, {"c_compiler": None})), "WARN", "none, Python.h on node1 (rank 2)"),
    ("C compiler", lambda: judge((2, {"python_header": False})), "WARN", "gcc, no Python.h on node1 (rank 2)"),
    ("C compiler", lambda: judge(*everywhere(python_header=False, **CPU)), "OK", "gcc, no Python.h"),
    ("GPU kernels", lambda: judge((2, {"gpu_kernel": "no ptxas"})), "FAIL", "not as they should be on node1 (rank 2)"),
    ("GPU kernels", lambda: judge(*everywhere(gpu_kernel=None)), "OK", "no GPU"),
    ("CPU kernels", lambda: judge((2, {"kernels": "no C compiler"})), "WARN", "eager torch on node1 (rank 2)"),
    ("configuration", lambda: judge((2, {"config": "ef" * 32})), "FAIL", "efefefefefef on node1 (rank 2)"),
    ("data", lambda: judge((2, {"data": Readable("", "", 0, "gone")})), "FAIL", "not readable on node1 (rank 2)"),
    ("data", lambda: judge((2, {"data": GOOD_DATA._replace(sha="ff")})), "FAIL", "ff on node1 (rank 2)"),
    ("data", lambda: judge(*everywhere(data=GOOD_DATA._replace(num_quarantined=1))), "WARN", "read from every rank"),
    ("model", lambda: judge((2, {"model": "no such size"})), "FAIL", "cannot train on node1 (rank 2)"),
    ("precision", lambda: judge((2, {"precision": "slow"})), "WARN", "slow on node1 (rank 2)"),
    ("teacher", lambda: judge(*everywhere(teacher=ReadableTeacher(sha="cd" * 32))), "OK", "sha256 cdcdcdcdcdcd"),
    (
        "teacher",
        lambda: judge(*everywhere(teacher=ReadableTeacher(sha="cd")), (3, {"teacher": ReadableTeacher(sha="ef")})),
        "FAIL",
        "sha256 ef on node1 (rank 3)",
    ),
    (
        "teacher",
        lambda: judge(*everywhere(teacher=ReadableTeacher(sha="cd")), (3, {"teacher": ReadableTeacher("no file")})),
        "FAIL",
        "not usable on node1 (rank 3)",
    ),
    (
        "clocks",
        lambda: judge(network=Network([Pair(1, 1e-4, -0.9, 1e9), Pair(2, 1e-4, 0.9, 1e9)], 1e9)),
        "WARN",
        "1.8 s apart at most (1 ranks were left out",
    ),
    (
        "latency",
        lambda: judge(network=Network([*FAST.pairs[:2], Pair(3, 0.03, 0, 1e9)], 1e9)),
        "WARN",
        "median 0.1 ms, most 30 ms: node0 (rank 0) and node1 (rank 3)",
    ),
    (
        "bandwidth",
        lambda: judge(network=Network([*FAST.pairs[:2], Pair(3, 1e-4, 0, 2e6)], 1e6)),
        "WARN",
        "median 1,000 MB/s, least 2 MB/s: node0 (rank 0) and node1 (rank 3); each rank in an all-gather 1 MB/s",
    ),
    (
        "bandwidth",
        lambda: judge(network=Network([*FAST.pairs[:2], Pair(3, 1e-4, 0, 4e8)], 4e8)),
        "WARN",
        "least 400 MB/s",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_verdicts(case: Case) -> None:
    name, make, verdict, value = case
    checks = make()
    assert checks[name].verdict == verdict
    assert value in checks[name].value
    assert bool(checks[name].advice) == (verdict != "OK")
    others = {check.verdict for check in checks.values() if check.name not in (name, "DALI", "devices")}
    assert others <= {"OK"}


def test_advice_of_data_is_the_reason() -> None:
    assert judge((2, {"data": Readable("", "", 0, "the disk does not answer: /x")}))["data"].advice.endswith("/x")


def test_table_has_a_line_a_check_and_what_to_do() -> None:
    text = format_checks([Check("a", "1"), Check("longer", "2", "FAIL", "repair it")])
    assert text.splitlines() == [
        "OK    a       1",
        "FAIL  longer  2",
        "              -> repair it",
        "1 OK, 0 WARN, 1 FAIL",
    ]


def test_facts_of_this_machine_are_collected() -> None:
    ranks = Ranks(0, 1, 0, 1)
    facts = collect_facts(None, ranks, torch.device("cpu"))
    assert facts.versions["torch"] == torch.__version__.split("+")[0]
    assert facts.free_memory > 0
    assert facts.kernels is None
    assert (facts.config, facts.data, facts.gpu_kernel) == (None, None, None)
    assert facts.c_compiler is not None
    assert measure_network(ranks, torch.device("cpu")) is None


def test_hosts_may_read_the_data_from_other_paths(tiny_images: Path, tmp_path: Path) -> None:
    config = load_config("fashion_small")
    (tmp_path / "link").symlink_to(tiny_images)
    found = []
    for root, num_classes in ((tiny_images, 4), (tmp_path / "link", 4), (tiny_images, 5)):
        data = dataclasses.replace(config.data, root=str(root))
        model = dataclasses.replace(config.model, num_classes=num_classes)
        here = dataclasses.replace(config, data=data, model=model)
        found.append(collect_facts(here, Ranks(0, 1, 0, 1), torch.device("cpu")).config)
    assert found[0] == found[1] != found[2]


def test_the_page_cache_of_a_container_is_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("950000\n")
    (tmp_path / "memory.stat").write_text("anon 150000\nfile 800000\ninactive_file 500000\nactive_file 200000\n")
    assert free_memory(tmp_path) == 750_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1_000_000


def test_kernel_is_built_run_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in place of a GPU."""
    assert compare_kernel(torch.device("cpu")) == ""
    calls: list[int] = []

    def wrong_the_second_time(bits: torch.Tensor, *moments: torch.Tensor, **rates: Any) -> None:
        calls.append(len(calls))
        bits[0] ^= calls[-1]

    def slow(*tensors: torch.Tensor, **rates: Any) -> None:
        warnings.warn("the flip rule runs in eager torch, many times slower: no gcc", RuntimeWarning, 2)

    def broken(*tensors: torch.Tensor, **rates: Any) -> None:
        raise OSError("libcuda.so cannot be loaded\nat all")

    for kernel, problem in (
        (wrong_the_second_time, "its bits are not those of the CPU"),
        (slow, "the flip rule runs in eager torch, many times slower: no gcc"),
        (broken, "OSError: libcuda.so cannot be loaded"),
    ):
        monkeypatch.setattr(doctor_facts, "bop2ndorder_bits_", kernel)
        assert compare_kernel(torch.device("cpu")) == problem


def test_a_folder_that_takes_no_files_has_no_room(tmp_path: Path) -> None:
    assert free_where_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    # Root may write into /proc by its rights, yet nobody can make a file there.
    assert free_where_writable(Path("/proc")) is None


def test_data_that_cannot_be_read_is_a_problem(tmp_path: Any) -> None:
    from tests.conftest import write_images

    root = write_images(tmp_path / "images", num_classes=2, train=2, val=1)
    good = readable(DataConfig(root=str(root)))
    assert (good.problem, len(good.sha)) == ("", 64)
    assert good.summary.startswith("4 training and 2 validation images of 2 classes")
    assert "does not exist" in readable(DataConfig(root=str(tmp_path / "nothing"))).problem
    assert readable(DataConfig(root=str(tmp_path / "nothing"))).sha == ""


def test_a_disk_that_does_not_answer_is_a_problem(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from bitfleet.trainer.data.image_list import ImageList
    from tests.conftest import write_images

    root = write_images(tmp_path / "images", num_classes=2, train=2, val=1)
    release = threading.Event()

    def never(*_: Any) -> bytes:
        release.wait()
        return b""

    monkeypatch.setattr(ImageList, "read", never)
    found = readable(DataConfig(root=str(root), stall_seconds=0.1))
    release.set()
    assert found.problem.startswith(f"the disk does not answer: {root}/train/class0/0000.png")


def test_help_and_misspelt_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        doctor(["--help"])
    assert "usage: bitfleet doctor" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--config"):
        doctor(["--epochs", "3"])
