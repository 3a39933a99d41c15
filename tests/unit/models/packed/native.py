"""Compile C programs of the tests with the C library, and run them."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from bitfleet.packed.program import Array, Kind, Program, to_bytes
from tests.unit.models.packed.programs import random_image

REPOSITORY = Path(__file__).parents[4]
SOURCES = Path(__file__).parent
LIBRARY = REPOSITORY / "models" / "packed"
FLAGS = ("-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror")
THREADS = ("-fopenmp", "-DDIVIDED_WORK=0")
"""Small operations run on several threads, too."""
SANITIZERS = (
    *THREADS,
    "-g",
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)


def need(tool: str, package: str) -> str:
    """Return the path of a program, or skip the test with the package that has it."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"there is no {tool}: apt-get install {package}")
    return path


def compile_c(target: Path, sources: Sequence[Path], *flags: str, compiler: str = "gcc") -> Path:
    """Compile and link `sources`; return `target`."""
    command = [compiler, *FLAGS, f"-I{LIBRARY}", *map(str, sources), *flags, "-o", str(target), "-lm"]
    subprocess.run(command, check=True)
    return target


def run_c(*command: str | Path) -> str:
    """Return what a program prints; fail with what it writes to stderr."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # do not spin on a busy machine
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr[-8000:]}"
    return done.stdout


def drive(driver: Sequence[str | Path], programs: Mapping[str, Program], folder: Path, most_threads: int) -> list[str]:
    """Run driver.c on an image for each program, whose results go to `folder`; return the paths."""
    arguments: list[str | Path] = []
    for name, program in programs.items():
        files = [folder / f"{name}.{suffix}" for suffix in ("program", "pixels", "results")]
        files[0].write_bytes(to_bytes(program))
        files[1].write_bytes(random_image(program, 0).tobytes())
        arguments += files
    return run_c(*driver, str(most_threads), *arguments).split()


def results(program: Program, name: str, folder: Path) -> tuple[Array, Array]:
    """Return the sums of all binary convolutions and the logits that driver.c wrote."""
    targets = [o.target for o in program.operations if o.kind is Kind.BINARY_CONV]
    num_sums = sum(target.height * target.width * target.channels for target in targets)
    words = np.fromfile(folder / f"{name}.results", np.int32)
    return words[:num_sums], words[num_sums:].view(np.float32)
