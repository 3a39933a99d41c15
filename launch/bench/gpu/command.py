"""`bitfleet bench gpu`: all that a GPU should show, in under 11 minutes and without a network.

Each part runs in its own process, so that one that crashes, hangs or breaks the GPU's context does
not end the others. A part measures, or it runs tests of tests/gpu.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from bitfleet.launch.bench.command import Gpu, PartName
from bitfleet.launch.bench.gpu.targets import format_targets
from bitfleet.launch.bench.results import Row, Session, append_row, format_rows, read_rows
from bitfleet.launch.job import run

_RESERVED_SECONDS = 5.0
"""For the last table."""
_LAST_LINES = 6
"""Lines to keep of the log of a part that failed."""
_CHILD = (sys.executable, "-m", "bitfleet.launch.bench.gpu.command")
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-rPfE", "-p", "no:cacheprovider", "-m", "gpu")
TESTS_FOLDER = Path(__file__).resolve().parents[3] / "tests" / "gpu"
"""It is in the source tree only."""


class Part(NamedTuple):
    """One process."""

    least_seconds: float
    """With less time left it is not started."""
    most_seconds: float
    """After that it is ended, so that the next ones get their turn."""
    purpose: str
    module: str = "parts"
    """Module of the function measure_NAME. A file of tests/gpu: run its tests instead."""
    tests: str = ""
    """Expression that selects tests of the file."""


PARTS = {
    "probe": Part(3, 40, "the card and versions"),
    "rule": Part(15, 80, "bits of the update rules against the CPU's and the recorded ones", "test_rule.py"),
    "gradients": Part(
        15, 60, "gradients, and sums of bits, against the CPU's", "test_networks.py", "gradients or sums"
    ),
    "update": Part(30, 90, "ns per weight of the update, against fused AdamW and a copy"),
    "networks": Part(30, 180, "images/s and peak memory of the networks, against timm's resnet18"),
    "repeat": Part(15, 45, "bits of a step that is repeated", "test_networks.py", "twice"),
    "waits": Part(15, 60, "where the trainer waits for the GPU", "test_trainer.py", "wait or pinned"),
    "trainer": Part(30, 60, "ms per step of the trainer", "trainer"),
    "pixels": Part(15, 60, "decoding on the GPU: pixels, races", "test_data.py", "decodes or busy"),
    "dali": Part(20, 60, "decoding on the GPU: images/s, memory"),
    "cifar": Part(60, 1e9, "BinaryNet on CIFAR-10 for as many epochs as fit; needs --cifar", "trainer"),
}
"""Most valuable first; the last one gets the time that is left."""


def bench_gpu(options: Gpu) -> Iterator[str]:
    """Run the parts, each in a process, and yield their tables.

    Raises:
        ValueError: bad input.
    """
    for option, root in (("--cifar", options.cifar), ("--imagenet", options.imagenet)):
        if root is not None and not root.is_dir():
            raise ValueError(f"{option} {root} is not a folder; it should hold train/<class>/ and val/<class>/")
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("bench gpu measures a GPU, and torch finds no CUDA device: --tiny is a dry run without one")
    path = options.output or Path("runs") / f"bench-gpu-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    if path.exists():
        raise ValueError(f"--output {path} exists already; name a new file, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    yield f"results: {path}; what the parts print: {_log(path)}; at most {options.seconds} s"
    if options.tiny:
        yield "--tiny: a dry run, no figure means anything"
    deadline = time.monotonic() + options.seconds - _RESERVED_SECONDS
    roots = [str(root) if root else None for root in (options.cifar, options.imagenet)]
    for name in get_args(PartName):
        if not options.only or name in options.only:
            yield run_part(Session(name, str(path), deadline, options.tiny, *roots))
    yield format_targets(read_rows(path))


def run_part(session: Session) -> str:
    """Run a part in its own process and return its table; its failure is a result."""
    name, output = session.part, Path(session.output)
    part, start, left = PARTS[name], time.monotonic(), session.seconds_left()
    num_before = len(read_rows(output))
    is_test, file = part.module.startswith("test_"), TESTS_FOLDER / part.module
    if left < part.least_seconds and not session.tiny:
        append_row(output, name, "the part", skipped=f"{part.least_seconds} s needed, {max(left, 0):.0f} s left")
    elif is_test and not file.exists():
        append_row(output, name, "the part", skipped=f"{file} is not there: run this in the source tree")
    else:
        allowed = left if session.tiny else min(left, part.most_seconds)
        child = json.dumps(dataclasses.asdict(dataclasses.replace(session, deadline=start + allowed)))
        command = [*_PYTEST, "-k", part.tests, str(file)] if is_test else [*_CHILD, child]
        variables = {"BITFLEET_GPU_DRY_RUN": "1"} if session.tiny else {}
        variables |= {"BITFLEET_GPU_PHOTOS": session.imagenet} if session.imagenet else {}
        with _log(output).open("a") as log:
            print(f"== {name}", file=log, flush=True)
            failure = _run_process(command, log.fileno(), allowed, variables)
        last = _log(output).read_text(errors="replace").splitlines()[-_LAST_LINES:]
        if is_test and failure in ("", "exit code 1"):
            append_row(output, name, "tests", **count_tests(last[-1]))
        if failure:
            append_row(output, name, "the part", error=failure, where="\n".join(last))
    title = f"\n== {name}: {part.purpose} ({time.monotonic() - start:.0f} s)"
    return f"{title}\n{format_rows(read_rows(output)[num_before:])}"


def count_tests(summary: str) -> Row:
    """Return the figures in pytest's last line."""
    counts = {outcome: int(number) for number, outcome in re.findall(r"(\d+) (passed|failed|error)", summary)}
    if not counts:
        return {"skipped": summary}
    return {"failed": counts.get("failed", 0) + counts.get("error", 0), "passed": counts.get("passed", 0)}


def _run_process(command: Sequence[str], log: int, seconds: float, variables: Mapping[str, str]) -> str:
    """Run a command in its own process group; return what went wrong, or ""."""
    alone = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # a machine without a network has no other
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}
    environment = {**alone, **os.environ, **path, **variables}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        code = process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s, ended"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its group, in which workers may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}" if code else ""


def _log(output: Path) -> Path:
    return output.with_suffix(".log")


def main() -> None:
    """Run one part: the entry point of its process, whose argument is its `Session` as JSON."""
    session = Session(**json.loads(sys.argv[1]))
    if session.tiny and not session.is_cuda:
        torch.compiler.set_stance("force_eager")  # compiling C++ would take most of a dry run
    module = importlib.import_module(f"bitfleet.launch.bench.gpu.{PARTS[session.part].module}")
    run(lambda: getattr(module, f"measure_{session.part}")(session))


if __name__ == "__main__":
    main()
