"""`bitfleet bench gpu`: everything that a first hour on a GPU should show, in under 11 minutes and without a network.

Each part runs in a process of its own, so that one that crashes, hangs or breaks the GPU's context does not end the others. Its
results are in the output file as soon as they are known; this process only starts parts and prints tables.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bitfleet.launch.bench.gpu.rows import append_row, format_rows, read_rows
from bitfleet.launch.bench.gpu.targets import format_targets
from bitfleet.launch.job import job, run
from bitfleet.launch.parsing.options import take_flag, take_list, take_number, take_option
from bitfleet.trainer.run.user_paths import users_path

if TYPE_CHECKING:
    from bitfleet.launch.bench.gpu.session import Session

SECONDS = 600
_RESERVED_SECONDS = 5.0
"""For the last table."""
_LAST_LINES = 6
"""Of the log of a part that failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What a part is told."""

    output: str
    """File of the results."""
    tiny: bool
    deadline: float
    """time.monotonic() at which the part has to be done."""
    cifar: str | None
    """Class folders of CIFAR-10."""
    imagenet: str | None
    """A data set of photos."""


class Part(NamedTuple):
    """One process."""

    run: Callable[["Session", Options], None]
    least_seconds: float
    """With less time left it is not started."""
    most_seconds: float
    """After that it is ended, so that the next ones get their turn."""
    purpose: str


def _probe(session: "Session", options: Options) -> None:
    from bitfleet.launch.bench.gpu.probe import measure_probe

    measure_probe(session)


def _rule(session: "Session", options: Options) -> None:
    from bitfleet.launch.bench.gpu.rule import measure_rule

    measure_rule(session)


def _gradients(session: "Session", options: Options) -> None:
    from bitfleet.launch.bench.gpu.gradients import measure_gradients

    measure_gradients(session)


def _update(session: "Session", options: Options) -> None:
    from bitfleet.launch.bench.gpu.update import measure_update

    measure_update(session)


def _networks(session: "Session", options: Options) -> None:
    from bitfleet.launch.bench.gpu.networks import measure_networks

    measure_networks(session)


def _repeat(session: "Session", options: Options) -> None:
    from bitfleet.launch.bench.gpu.repeat import measure_repeat

    measure_repeat(session)


def _trainer(session: "Session", options: Options) -> None:
    with job("auto") as (ranks, _):
        from bitfleet.configs import load_config
        from bitfleet.launch.bench.gpu.trainer import measure_trainer

        configs = [load_config("binarynet_cifar10"), load_config("fashion_quickstart")]
        measure_trainer(session, configs, _path(options.cifar), ranks)


def _cifar(session: "Session", options: Options) -> None:
    if options.cifar is None and not options.tiny:
        session.add("BinaryNet", skipped="--cifar names no class folders of CIFAR-10")
        return
    with job("auto") as (ranks, _):
        from bitfleet.configs import load_config
        from bitfleet.launch.bench.gpu.cifar import measure_cifar

        measure_cifar(session, load_config("binarynet_cifar10"), _path(options.cifar), ranks)


def _dali(session: "Session", options: Options) -> None:
    from bitfleet.launch.bench.gpu.dali import measure_dali

    measure_dali(session, _path(options.imagenet))


PARTS = {
    "probe": Part(_probe, 3, 40, "the card, versions, tools"),
    "rule": Part(_rule, 15, 80, "bits of the update rules against the CPU's and the recorded ones"),
    "gradients": Part(_gradients, 15, 60, "gradients of the networks against the CPU's; sums of binary convolutions"),
    "update": Part(_update, 30, 90, "ns per weight and GB/s of the update, against fused AdamW and a copy"),
    "networks": Part(_networks, 30, 180, "images/s and peak memory of the networks, against timm's resnet18"),
    "repeat": Part(_repeat, 15, 45, "whether a step has the same bits twice"),
    "trainer": Part(_trainer, 30, 120, "ms per step of the trainer, and where it waits for the GPU"),
    "cifar": Part(_cifar, 60, 1e9, "BinaryNet on CIFAR-10 for as many epochs as fit; needs --cifar"),
    "dali": Part(_dali, 20, 75, "decoding on the GPU: pixels, races, images/s, memory"),
}
"""In order of worth; what comes last has what time is left."""


def bench_gpu(arguments: Sequence[str]) -> None:
    """Parse `arguments`, run the parts, and print their tables.

    Raises:
        ValueError: bad input.
    """
    seconds, rest = take_number(arguments, "--seconds", SECONDS)
    output, rest = take_option(rest, "--output")
    cifar, rest = take_option(rest, "--cifar")
    imagenet, rest = take_option(rest, "--imagenet")
    output, cifar, imagenet = (path and str(users_path(path)) for path in (output, cifar, imagenet))
    only, rest = take_list(rest, "--only")
    tiny, rest = take_flag(rest, "--tiny")
    if rest:
        raise ValueError(f"bench gpu has no option {rest[0]!r}; `bitfleet bench --help` lists them")
    if unknown := [name for name in only if name not in PARTS]:
        raise ValueError(f"bench gpu has no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    for option, root in (("--cifar", cifar), ("--imagenet", imagenet)):
        if root is not None and not Path(root).is_dir():
            raise ValueError(f"{option} {root} is not a folder; it should hold train/<class>/ and val/<class>/")
    if not tiny and not _has_gpu():
        raise ValueError(
            "bench gpu measures a GPU, and torch finds no CUDA device here: --tiny is a dry run without one"
        )
    path = Path(output) if output else Path("runs") / f"bench-gpu-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    if path.exists():
        raise ValueError(f"--output {path} exists already; name a new file, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = Options(str(path), tiny, time.monotonic() + seconds - _RESERVED_SECONDS, cifar, imagenet)
    print(f"results: {path}; what the parts print: {_log(path)}; at most {seconds} s", flush=True)
    if tiny:
        print("--tiny: a dry run, no figure means anything", flush=True)
    names = [name for name in PARTS if not only or name in only]
    for index, name in enumerate(names):
        later = 0.0 if tiny else sum(PARTS[each].least_seconds for each in names[index + 1 :] if each == "dali")
        run_part(name, options, seconds_for_later_parts=later if name == "cifar" else 0.0)
    print(format_targets(read_rows(path)), flush=True)


def run_part(name: str, options: Options, *, seconds_for_later_parts: float = 0.0) -> None:
    """Run a part in a process of its own, until its deadline, and print its results; its failure is one of them."""
    part, output = PARTS[name], Path(options.output)
    start = time.monotonic()
    left = options.deadline - seconds_for_later_parts - start
    num_before = len(read_rows(output))
    if left < part.least_seconds and not options.tiny:
        append_row(output, name, "the part", skipped=f"{part.least_seconds} s needed, {max(left, 0):.0f} s left")
    else:
        allowed = left if options.tiny else min(left, part.most_seconds)
        told = dataclasses.asdict(dataclasses.replace(options, deadline=start + allowed))
        with _log(output).open("a") as log:
            print(f"== {name}", file=log, flush=True)
            code = _run_process([*_CHILD, name, json.dumps(told)], log.fileno(), allowed)
        if code != 0:
            append_row(output, name, "the part", error=_reason(code, allowed), where=_last_lines(_log(output)))
    print(f"\n== {name}: {part.purpose} ({time.monotonic() - start:.0f} s)", flush=True)
    print(format_rows(read_rows(output)[num_before:]), flush=True)


_CHILD = (sys.executable, "-m", "bitfleet.launch.bench.gpu.command")


def _run_process(command: Sequence[str], log: int, seconds: float) -> int | None:
    """Run a command in a process group of its own; returns its exit code, None where it had to be ended after `seconds`."""
    alone = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # a machine without a network has no other
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}
    environment = alone | os.environ | path
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        return process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # its group, in which workers may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(code: int | None, seconds: float) -> str:
    if code is None:
        return f"not done after {seconds:.0f} s, ended"
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _log(output: Path) -> Path:
    return output.with_suffix(".log")


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def _path(root: str | None) -> Path | None:
    return None if root is None else Path(root)


def main() -> None:
    """Entry point of the process of a part: its name and its options as JSON."""
    name, told = sys.argv[1:]
    options = Options(**json.loads(told))
    import torch

    from bitfleet.launch.bench.gpu.session import Session

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if options.tiny and device.type == "cpu":
        # Compiling C++ would take most of a dry run.
        torch.compiler.set_stance("force_eager")
    session = Session(name, device, Path(options.output), options.deadline, options.tiny)
    run(lambda: PARTS[name].run(session, options))


if __name__ == "__main__":
    main()
