"""`make libbitfleet_packed` builds a library and an example that classifies an image."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from bitfleet.packed.program import Array, Program, to_bytes
from bitfleet.packed.runner import PackedNetwork
from tests.unit.models.packed.native import REPOSITORY, need, run_c
from tests.unit.models.packed.programs import CLASSES, network, random_image


def build(folder: Path, *variables: str) -> None:
    command = ["make", "libbitfleet_packed", f"BUILD={folder}", *variables]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)


def write_image(path: Path, image: Array) -> None:
    height, width, _ = image.shape
    path.write_bytes(f"P6\n# a comment\n{width} {height}\n255\n".encode() + image.tobytes())


def lines_of(program: Program, image: Array) -> list[str]:
    """Return what the example should print, but the time."""
    (logits,) = PackedNetwork(to_bytes(program), {})(image[None]).astype(np.float64)
    chances = np.exp(logits - logits.max())
    chances *= 100 / chances.sum()
    return [f"{chances[i]:5.1f} %  {CLASSES[i]}" for i in np.argsort(-logits, kind="stable")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("make", "make")
    need("cc", "gcc")
    folder = tmp_path_factory.mktemp("built")
    build(folder)
    return folder


def test_example_classifies_an_image(built: Path, tmp_path: Path) -> None:
    program = network("birealnet18")
    image = random_image(program, 1)
    (tmp_path / "program").write_bytes(to_bytes(program))
    write_image(tmp_path / "image.ppm", image)
    *lines, last = run_c(built / "packed_example", tmp_path / "program", tmp_path / "image.ppm").splitlines()
    assert lines == lines_of(program, image)
    milliseconds, unit, _ = last.split()
    assert float(milliseconds) > 0
    assert unit == "ms"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"P5\n32 32\n255\n", "is not a binary PPM (P6)"),
        (b"P6\n32\n", "has a damaged header, or no bytes as pixels"),
        (b"P6 32 32 65535 ", "has a damaged header, or no bytes as pixels"),
        (b"P6 33 32 255 ", "has 32 x 33 pixels, height first; the program takes 32 x 32"),
        (b"P6 32 32 255 " + bytes(32 * 32 * 3 - 1), "is cut off"),
        (b"P6 32 32 255", "is cut off"),
        (b"", "is not a binary PPM (P6)"),
    ],
)
def test_example_refuses_other_images(content: bytes, sentence: str, built: Path, tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(to_bytes(network("birealnet18")))
    (tmp_path / "image.ppm").write_bytes(content)
    command = [built / "packed_example", tmp_path / "program", tmp_path / "image.ppm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"packed_example: {tmp_path}/image.ppm: {sentence}\n"


def test_example_numbers_classes_without_names(built: Path, tmp_path: Path) -> None:
    program = network("birealnet18")
    program.description = {"classes": ["a", "b"]}
    (tmp_path / "program").write_bytes(to_bytes(program))
    write_image(tmp_path / "image.ppm", random_image(program, 1))
    *lines, _ = run_c(built / "packed_example", tmp_path / "program", tmp_path / "image.ppm").splitlines()
    assert {line.partition("%  ")[2] for line in lines} == {"a", "b", "class 2", "class 3", "class 4"}


def test_shared_library_exports_the_header(built: Path) -> None:
    nm = need("nm", "binutils")
    header = (REPOSITORY / "models" / "packed" / "packed.h").read_text()
    for library in ("-D", built / "libbitfleet_packed.so"), (built / "libbitfleet_packed.a",):
        symbols = run_c(nm, "-g", "--defined-only", *library).split()
        exported = {symbol for symbol in symbols if symbol.startswith("packed_")}
        assert len(exported) > 9
        assert all(f"{symbol}(" in header for symbol in exported)


def test_another_compiler_builds_again(tmp_path: Path) -> None:
    need("make", "make")
    need("ar", "binutils")
    files = [tmp_path / "built" / name for name in ("packed.o", "libbitfleet_packed.so", "packed_example")]
    for name in ("first", "second"):
        compiler = tmp_path / name
        compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "$0" > "$2"\n')
        compiler.chmod(0o755)
        build(tmp_path / "built", f"CC={compiler}")
        assert [file.read_text() for file in files] == [f"{compiler}\n"] * 3
    times = [file.stat().st_mtime_ns for file in files]
    build(tmp_path / "built", f"CC={compiler}")
    assert [file.stat().st_mtime_ns for file in files] == times


def test_cross_compiled(tmp_path: Path) -> None:
    need("make", "make")
    need("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    emulator = need("qemu-aarch64", "qemu-user")
    build(tmp_path, "CC=aarch64-linux-gnu-gcc", "LDFLAGS=-static", "CFLAGS=-O2", "OPENMP=")
    program = network("birealnet18")
    image = random_image(program, 1)
    (tmp_path / "program").write_bytes(to_bytes(program))
    write_image(tmp_path / "image.ppm", image)
    printed = run_c(emulator, tmp_path / "packed_example", tmp_path / "program", tmp_path / "image.ppm")
    *lines, last = printed.splitlines()
    assert lines == lines_of(program, image)
    assert last.endswith(" ms (neon)")
