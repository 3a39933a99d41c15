"""`bitfleet bench NAME`: a dataclass of options per benchmark."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from bitfleet.launch.job import is_main_rank, job
from bitfleet.launch.parsing.commands import Count, MaybeCount, parse, parse_with_run

PartName = Literal[
    "probe", "rule", "gradients", "update", "networks", "repeat", "waits", "trainer", "pixels", "dali", "cifar"
]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Options of a benchmark whose contenders take turns."""

    rounds: Count = 5
    """Turns of each contender. One more comes first and does not count."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """Options of a benchmark that makes training steps."""

    steps: Count = 5
    """Training steps per measurement."""


@dataclasses.dataclass(frozen=True)
class Train(Steps, Rounds):
    """Compare the step loop with a bare torch loop on data in memory: images/s. Needs --config."""

    steps: Count = 40


@dataclasses.dataclass(frozen=True)
class Comm(Steps):
    """Count the bytes that a rank sends per step: bitfleet, ZeRO-0, 1, 2, DistributedDataParallel.

    What the network interfaces sent is this job's alone only in a network namespace
    (launch/cluster/hosts.sh).
    """


@dataclasses.dataclass(frozen=True)
class Step(Rounds):
    """Time the update of 12 and 62 million weights against AdamW and the memory; one process."""

    rounds: Count = 7


@dataclasses.dataclass(frozen=True)
class Networks(Steps, Rounds):
    """Compare training steps of a network with timm's resnet18 in one process: images/s, memory."""

    network: str = "birealnet18"
    """birealnet18, xnornet, binarynet or any network of timm."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """engine.precision. Default: fp32, then bf16."""
    compiled: bool = False
    """Measure compiled networks as well, which takes a minute each."""
    steps: Count = 2
    batch_size: MaybeCount = None
    """Images per step. Default: 50 for binarynet, else 8 on a CPU and 128 on a GPU."""


@dataclasses.dataclass(frozen=True)
class Sharding(Steps, Rounds):
    """Time steps and count bytes that a rank sends: bitfleet, DistributedDataParallel, ZeRO-1."""

    network: Literal["birealnet18", "xnornet"] | None = None
    """The only network to measure. Default: both."""
    contender: tuple[Literal["bits", "ddp", "zero1", "zero2", "none"], ...] = ("bits", "ddp", "zero1")
    """Contenders; fewer where the memory does not hold three networks."""
    micro_batch_size: Count = 8
    """Images per rank."""
    steps: Count = 3


@dataclasses.dataclass(frozen=True)
class Plan(Steps, Rounds):
    """Measure rates for `bitfleet plan --rates FILE`, and check its prediction. Needs --config."""

    steps: Count = 10
    output: Path | None = None
    """File to write the measured rates to."""


@dataclasses.dataclass(frozen=True)
class Diagnostics(Steps, Rounds):
    """Compare the training loop with and without metrics.diagnostics. Needs --config."""

    steps: Count = 20


@dataclasses.dataclass(frozen=True)
class Memory(Steps):
    """Count the bytes per parameter that a rank holds after a step and at its peak, as in comm."""


@dataclasses.dataclass(frozen=True)
class Checkpoint(Rounds):
    """Compare saves: bitfleet's in the background and blocking, ZeRO-1's, torch.save."""

    network: Literal["xnornet", "birealnet18", "birealnet_small"] = "xnornet"
    """Network to save; xnornet takes 4 GB of disk."""
    rounds: Count = 3
    folder: Path = Path("runs")
    """Where a new folder is made, and removed again."""


@dataclasses.dataclass(frozen=True)
class Journal(Steps, Rounds):
    """Compare steps with and without the flip journal, and encode random flips. Needs --config."""

    steps: Count = 20


@dataclasses.dataclass(frozen=True)
class Loader(Rounds):
    """Compare loaders of photos with torchvision and timm: images/s, CPU time."""

    memory: bool = False
    """Instead: images of 32 pixels with data.loader dali, torch and memory."""
    root: Path | None = None
    """Data set to take photos from. Default: synthetic photos, which stay in the cache folder."""
    images: MaybeCount = None
    """Photos. Default: 512, with --memory 5000."""
    batch_size: MaybeCount = None
    """Images per batch. Default: 64, with --memory 50."""
    num_workers: MaybeCount = None
    """Decoding threads or worker processes. Default: the number of cores."""


@dataclasses.dataclass(frozen=True)
class Packed(Rounds):
    """Time an exported network on one CPU core against torch and ONNX Runtime."""

    network: str = "birealnet18"
    """Network, with random weights: birealnet18, xnornet, ..."""
    size: Count = 224
    """Height and width of the image."""
    rounds: Count = 9


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Measure one GPU against the targets of docs/gpu.md, each part in its own process."""

    seconds: Count = 600
    """Time for all parts; what no longer fits is skipped."""
    output: Path | None = None
    """File of the results, one JSON line each. Default: a new file in runs/."""
    only: tuple[PartName, ...] = ()
    """Parts to run. Default: all."""
    tiny: bool = False
    """A dry run of every part in a minute or two, on a CPU too."""
    cifar: Path | None = None
    """Class folders of CIFAR-10, for cifar and trainer."""
    imagenet: Path | None = None
    """Data set of photos for pixels and dali. Default: synthetic photos."""


Benchmark = (
    Train
    | Comm
    | Step
    | Networks
    | Sharding
    | Plan
    | Diagnostics
    | Memory
    | Checkpoint
    | Journal
    | Loader
    | Packed
    | Gpu
)
OF_A_RUN, OF_ONE_PROCESS = ("train", "plan", "diagnostics", "journal"), ("step", "loader", "packed", "gpu")
MODULES = {"train": "loops", "diagnostics": "loops", "journal": "loops", "memory": "comm", "sharding": "comm"}
MODULES |= {"plan": "rates", "networks": "training", "gpu": "gpu.command"}


def bench(arguments: Sequence[str]) -> None:
    """Run the benchmark that `arguments` name; `bench_NAME` of its module yields tables.

    Raises:
        ValueError: bad input.
    """
    name, *words = arguments or ["--help"]
    prog = f"bitfleet bench {name}"
    config, benchmark = None, {command.__name__.lower(): command for command in get_args(Benchmark)}.get(name)
    if benchmark is None:
        parse(Benchmark, [name], "bitfleet bench")  # the help, or an error that lists the names
    elif name in OF_A_RUN:
        from bitfleet.launch.parsing.arguments import parse_train

        options, rest = parse_with_run(benchmark, words, prog)
        config = parse_train(rest, prog)
    else:
        options = parse(benchmark, words, prog)
    measure = getattr(importlib.import_module(f"bitfleet.launch.bench.{MODULES.get(name, name)}"), f"bench_{name}")
    if name in OF_ONE_PROCESS:
        for text in measure(options) if is_main_rank() else ():
            print(text, flush=True)
        return
    with job(config.device if config else "auto", config) as (ranks, device):
        for text in measure(options, *([config] if config else []), ranks, device):
            if is_main_rank():
                print(text, flush=True)
