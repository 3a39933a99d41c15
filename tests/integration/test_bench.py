"""Benchmarks of traffic, memory, checkpoints and loaders count what they should, on two ranks.
Nothing is timed."""

import gc
import os
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from bitfleet.launch.bench.comm import (
    GRAD_DTYPES,
    TITLES,
    CollectiveCounter,
    bench_comm,
    wire_bytes,
)
from bitfleet.launch.bench.command import Comm, bench
from bitfleet.launch.bench.loader import BITFLEET, BITFLEET_SMALL, contenders
from bitfleet.launch.bench.photos import find_photos, write_class_folders
from bitfleet.launch.bench.training import Method
from bitfleet.launch.plan.rates import read_rates
from bitfleet.launch.preflight.tensor_bytes import TensorBytes
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim.sharding.reduction import all_gather_single
from bitfleet.trainer.ranks.collectives import Ranks
from tests.conftest import REPOSITORY, Launch, run_bitfleet, run_command, run_ranks

NUM_BINARY, NUM_REAL = 16 * 256**2, 16 * 256 + 2570
Table = dict[tuple[Method, str], list[float]]


def parse(output: str) -> Table:
    """(method, gradient dtype) -> the numbers of its row."""
    rows: Table = {}
    for method, title in TITLES.items():
        for grad_dtype in GRAD_DTYPES:
            (numbers,) = re.findall(rf"^ *{re.escape(title)}, {grad_dtype} +(.*)$", output, re.MULTILINE)
            rows[method, grad_dtype] = [float(number.replace(",", "")) for number in numbers.split()]
    return rows


def check_traffic(rows: Table) -> None:
    """The counts of the calls, per binary weight, on two ranks."""
    for grad_dtype, width in (("fp32", 4), ("bf16", 2)):
        bits, none, zero1, zero2, ddp = (rows[method, grad_dtype][0] for method in TITLES)
        real = NUM_REAL / NUM_BINARY
        # Half of all gradients, of the signs and of the real values; then a little for what is
        # agreed on before the update.
        least = (width + 1 / 8) / 2 + real * (width + 4) / 2
        assert least < bits < least + 0.002
        assert none == pytest.approx(width * (1 + real), abs=0.001)
        assert ddp == pytest.approx(none, abs=0.001)
        assert bits < none < zero1
        assert zero1 == zero2


def test_comm_counts_what_two_ranks_send() -> None:
    done = run_ranks(2, "-m", "bitfleet.launch", "bench", "comm", "--steps", "2")
    assert done.returncode == 0, done.stdout
    check_traffic(parse(done.stdout))


def test_plan_predicts_a_step_and_measures_it(tiny: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    done = run_ranks(
        2, "-m", "bitfleet.launch", "bench", "plan", "--rounds", "1", "--steps", "2", "--output", file, *tiny
    )
    assert done.returncode == 0, done.stdout
    (row,) = re.findall(r"^  ms per step +([\d.]+) +([\d.]+) +([\d.]+) ", done.stdout, re.MULTILINE)
    predicted, measured, ratio = map(float, row)
    assert ratio == pytest.approx(predicted / measured, rel=0.05)  # of one round
    rates = read_rates(file)
    assert (rates.device, rates.cores) == ("cpu", len(os.sched_getaffinity(0)))


@pytest.mark.slow
def test_diagnostics_are_measured_with_and_without(tiny: list[str]) -> None:
    done = run_bitfleet("bench", "diagnostics", "--rounds", "1", "--steps", "5", *tiny)
    assert done.returncode == 0, done.stdout
    (row,) = re.findall(r"^  CPU ms of rank 0 per step +([\d.]+) +([\d.]+) +([\d.]+) ", done.stdout, re.MULTILINE)
    with_them, without, ratio = map(float, row)
    assert ratio == pytest.approx(with_them / without, rel=0.01)  # of one round


@pytest.mark.slow
def test_memory_of_two_ranks_stays_in_bounds(deepspeed: Launch) -> None:
    done = deepspeed(2, "--module", "bitfleet.launch", "bench", "memory", "--steps", "2", timeout=300)
    assert done.returncode == 0, done.stdout
    rows = parse(done.stdout)
    for grad_dtype in GRAD_DTYPES:
        after_step, peak = rows["bits", grad_dtype]
        # Weights, two moments of half of them, and the slice as bits; the real weights of the bits
        # are the rest.
        assert after_step == pytest.approx(4 + 8 / 2 + 1 / 16, abs=0.01)
        assert peak <= 8 + 8 / 2 + 2 * 0.5
        assert after_step < rows["zero1", grad_dtype][0] < rows["none", grad_dtype][0]
        assert peak < rows["zero1", grad_dtype][1]


@pytest.mark.slow
def test_checkpoint_writes_what_it_should(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    own = ["--network", "birealnet18", "--rounds", "1", "--folder", str(folder)]
    done = run_ranks(2, "-m", "bitfleet.launch", "bench", "checkpoint", *own, timeout=240)
    assert done.returncode == 0, done.stdout  # the last checkpoint is committed, and its hashes are right
    sizes = {}
    for title in ("in the background", "blocking", "save_checkpoint", "rank 0"):
        (numbers,) = re.findall(rf"^  .*{title} +(\d.*)$", done.stdout, re.MULTILINE)
        sizes[title] = float(numbers.split()[3].replace(",", ""))
    num_weights = sum(parameter.numel() for parameter in create_model(ModelConfig(name="birealnet18")).parameters())
    assert sizes["in the background"] == pytest.approx(sizes["blocking"], abs=0.01)
    assert sizes["in the background"] <= 1.06 * 8 * num_weights / 1e6  # two moments, the signs, BatchNorm's statistics
    assert sizes["in the background"] < sizes["rank 0"] < sizes["save_checkpoint"]
    assert list(folder.iterdir()) == []


LOADER = ["loader", "--images", "8", "--rounds", "1", "--batch_size", "4", "--num_workers", "1"]


@pytest.mark.slow
def test_loaders_of_photos_are_measured_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    before = psutil.Process().children()  # the tests' fork server
    bench(LOADER)
    output = capsys.readouterr().out
    assert "8 synthetic photos of" in output
    for title in contenders(Path(), Path(), 4, 1):
        (row,) = re.findall(rf"^  {re.escape(title)}  +(\d.*)$", output, re.MULTILINE)
        assert re.fullmatch(r"[\d,.]+ \(.* - .*\) +[\d.]+ \(.* - .*\) +[\d.]+", row), row
    assert psutil.Process().children() == before


def test_loaders_of_small_images_are_measured_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    bench(["loader", "--memory", "--images", "40", "--rounds", "1", "--batch_size", "5", "--num_workers", "1"])
    output = capsys.readouterr().out
    assert "40 images of 32 pixels, batches of 5, 1 threads or workers, median of 1 rounds" in output
    for loader in ("dali", "torch", "memory"):
        (row,) = re.findall(rf"^  {loader}  +(\d.*)$", output, re.MULTILINE)
        assert re.fullmatch(r"[\d,.]+ \(.* - .*\) +[\d,.]+ \(.* - .*\) +[\d.]+", row), row


def test_every_loader_gives_the_same_kind_of_batches(tmp_path: Path) -> None:
    write_class_folders(find_photos(None, 8, num_workers=1), tmp_path / "originals")
    shapes = {}
    for title, start in contenders(tmp_path / "originals", tmp_path / "small", 4, 1).items():
        if title != BITFLEET_SMALL:
            gc.collect()  # see take_loader_turn
            batches = start()
            for _ in range(5):  # more than an epoch
                images, labels = next(batches)  # type: ignore[misc]
            assert labels.tolist() == [0] * 4, title
            shapes[title] = (tuple(images.shape), str(images.dtype))
            del batches, images, labels
    assert shapes.pop(BITFLEET) == shapes.pop("bitfleet, loader=torch") == ((4, 224, 224, 3), "torch.uint8")
    assert shapes.pop("bitfleet, preprocessing=official") == ((4, 224, 224, 3), "torch.float32")
    assert shapes.pop("torchvision, PIL, float32") == ((4, 3, 224, 224), "torch.float32")
    assert set(shapes.values()) == {((4, 3, 224, 224), "torch.uint8")}
    assert len(shapes) == 2  # torchvision's and timm's


@pytest.mark.multinode
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_wire_between_two_hosts_carries_what_the_calls_say() -> None:
    done = run_command(
        [REPOSITORY / "launch" / "cluster" / "hosts.sh", "2", "1", "-m", "bitfleet.launch", "bench", "comm"]
    )
    assert done.returncode == 0, done.stdout
    rows = parse(done.stdout)
    check_traffic(rows)
    for calls, wire, between_hosts in rows.values():
        assert calls <= wire <= 1.25 * calls  # headers, acknowledgements, and on a busy machine packets sent twice
        assert wire - between_hosts < 0.005  # nothing takes another way


@pytest.mark.multinode
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="network namespaces need root and iproute2")
def test_slow_wires_between_three_hosts_carry_what_the_calls_say() -> None:
    done = run_command(
        [
            REPOSITORY / "launch" / "cluster" / "hosts.sh",
            "3",
            "1",
            "--rate",
            "1gbit",
            "-m",
            "bitfleet.launch",
            "bench",
            "comm",
            "--steps",
            "2",
        ]
    )
    assert done.returncode == 0, done.stdout
    assert "3 ranks on 3 hosts" in done.stdout
    for calls, wire, between_hosts in parse(done.stdout).values():
        assert calls <= wire <= 1.25 * calls  # small packets, each acknowledged
        assert wire - between_hosts < 0.005


def test_hosts_want_their_numbers() -> None:
    done = run_command([REPOSITORY / "launch" / "cluster" / "hosts.sh", "2"])
    assert done.returncode == 2
    assert "NUM_HOSTS RANKS_PER_HOST [--rate RATE] SCRIPT" in done.stdout


@pytest.mark.usefixtures("process_group")
def test_collectives_count_as_the_best_algorithm() -> None:
    mine, whole = torch.ones(6), torch.empty(6)
    with CollectiveCounter(world_size=4) as counter:
        sent = [0.0]

        def newly_sent() -> float:
            sent.append(counter.sent_bytes)
            return sent[-1] - sent[-2]

        dist.all_reduce(mine)
        assert newly_sent() == 2 * 3 / 4 * 24
        all_gather_single(whole, mine)
        assert newly_sent() == 3 / 4 * 24
        dist.all_to_all_single(whole, mine)
        assert newly_sent() == 3 / 4 * 24
        dist.broadcast(mine.double(), 0)
        assert newly_sent() == 3 / 4 * 48
        dist.barrier()
        mine.mul_(2)
        assert newly_sent() == 0


def test_tensor_bytes_count_every_storage_while_it_lives() -> None:
    with TensorBytes() as count:
        first = torch.zeros(10)
        view, meta = first.view(2, 5), torch.empty(1000, device="meta")
        assert count.live == 40
        second = first.double().exp()
        assert count.live == 40 + 80
        assert count.take_peak() == 40 + 80 + 80
        del first, second, meta
        assert count.live == 40
        assert count.take_peak() == 40 + 80
        del view
        assert count.live == 0
        parameter = torch.ones(5, requires_grad=True)
        square = parameter.exp().square().sum()  # backward keeps the exponential, which nothing else refers to
        assert count.live == 20 + 20 + 4
        torch.autograd.backward(square)
        assert count.live == 20 + 20 + 4
        del square
        assert count.live == 40


@pytest.mark.usefixtures("process_group")
def test_interface_counters_are_read() -> None:
    everything, without_loopback = wire_bytes(Ranks(0, 1, 0, 1)).tolist()
    assert everything >= without_loopback >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("memory --width 3", "bench memory.*--width"),
        ("sharding --contender fsdp", "'fsdp'.*bits"),
        ("sharding --network lenet", "'lenet'.*--network.*'xnornet'"),
        ("checkpoint --steps 3", "bench checkpoint.*--steps"),
        ("checkpoint --network lenet", "'lenet'.*--network.*'birealnet_small'"),
        ("loader --steps 3", "bench loader.*--steps"),
        ("loader --manifest", "bench loader.*--manifest"),
        ("loader --memory --root x", "--memory.*--root"),
        ("loader --memory --images 8 --batch_size 9", "--batch_size 9 .*8 images"),
        ("loader --images 8 --batch_size 9", "--batch_size 9 .*8 images"),
        ("comm --steps 0", "--steps.*'0'"),
        ("wire", "'wire'.*train, "),
    ],
)
def test_bad_input(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(words.split())


def test_bad_input_of_a_job() -> None:
    ranks, device = Ranks(0, 1, 0, 1), torch.device("cpu")
    with pytest.raises(ValueError, match="one rank.*several"):
        next(bench_comm(Comm(), ranks, device))
