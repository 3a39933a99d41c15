"""C files compile without a warning and compute what the packed runner computes, to the last bit of
its portable path."""

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bitfleet.configs.fashion_quickstart import config
from bitfleet.launch.export.c_export import CNetwork, compile_c
from bitfleet.models import create_model
from bitfleet.packed.c_format import CSource, needed_kernels, to_c
from bitfleet.packed.program import Buffer, Kind, Operation, Program, Type
from tests.unit.models.packed.mixed import SIZE, mixed
from tests.unit.models.packed.networks import (
    exact_images,
    expected_logits,
    expected_sums,
    lowered,
    make_exact,
    network,
    packed,
    random_images,
)
from tests.unit.models.packed.programs import random_image, random_program

WARNINGS = ("-Wall", "-Wextra", "-Werror", "-pedantic")
SMALL = {"num_classes": 7, "width": 12}
NETWORKS: list[tuple[str, int, dict[str, Any]]] = [
    ("birealnet_small", 31, SMALL | {"residual": "single"}),
    ("birealnet_small", 45, SMALL | {"norm": "layer", "width": 40}),
    ("birealnet18", 67, SMALL | {"norm": "none"}),
    ("binarynet", 32, {"width": 20}),
    ("binarynet", 32, {"width": 20, "norm": "layer"}),
    ("reactnet_small", 31, SMALL),
    ("reactnet_a", 47, {"num_classes": 7, "width": 5}),
    ("quicknet", 75, {"num_classes": 7, "width": 20, "depths": (2, 1, 1)}),
    ("binary_resnet_e18", 45, SMALL | {"depths": (1, 2)}),
    ("real_to_binary", 45, {"num_classes": 7, "width": 16, "depths": (2, 1)}),
]

Compile = Callable[[Program], tuple[CSource, CNetwork]]


@pytest.fixture
def build(tmp_path: Path) -> Compile:
    """Return a function that compiles the C files of a program."""

    def result(program: Program) -> tuple[CSource, CNetwork]:
        files = to_c(program, f"net{len(list(tmp_path.iterdir()))}")
        library = compile_c(files, tmp_path, WARNINGS)
        return files, CNetwork(library, files.name, program.operations[-1].target)

    return result


def sums_of(program: Program, index: int) -> Program:
    """Return the program that ends with the sums of products of operation `index`, as floats."""
    cut = copy.deepcopy(program.operations[: index + 1])
    for operation in cut:
        for buffer in operation.buffers:
            buffer.slot = -1
    last = cut[-1]
    size = (last.target.height, last.target.width, last.target.channels)
    last.target, last.factor, last.offset, last.other, last.signs = Buffer(*size, Type.SUMS), None, None, None, None
    return Program([*cut, Operation(Kind.AFFINE, last.target, Buffer(*size))], {})


@pytest.fixture(scope="module")
def quickstart() -> Program:
    torch.manual_seed(0)
    return lowered(make_exact(create_model(config().model).eval()), config().data.image_size)


def test_quickstart(quickstart: Program, build: Compile) -> None:
    images = random_images(4, 32)
    files, found = build(quickstart)
    expected = packed(quickstart)(images)
    assert np.abs(found(images) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert files.constant_bytes < 100_000
    assert files.buffer_bytes < 256_000


def test_integers_of_the_quickstart(build: Compile) -> None:
    torch.manual_seed(0)
    model, (image,) = make_exact(create_model(config().model).eval()), exact_images(1, 32)
    program = lowered(model, 32)
    indices = [index for index, o in enumerate(program.operations) if o.kind is Kind.BINARY_CONV]
    expected, runner = expected_sums(model, image), packed(program)
    assert len(indices) == len(expected) == 6
    for index, sums in zip(indices, expected, strict=True):
        _, found = build(sums_of(program, index))
        np.testing.assert_array_equal(found(image[None])[0], sums)
        np.testing.assert_array_equal(runner.sums(image, index), sums)


@pytest.mark.parametrize(("name", "size", "options"), NETWORKS)
def test_same_bits_as_the_portable_path(name: str, size: int, options: dict[str, Any], build: Compile) -> None:
    program, images = lowered(network(name, **options), size), random_images(2, size)
    _, found = build(program)
    np.testing.assert_array_equal(found(images), packed(program, "portable")(images))


@pytest.mark.parametrize("seed", range(40, 52))
def test_random_programs(seed: int, build: Compile) -> None:
    program = random_program(seed)
    image = random_image(program, seed)[None]
    _, found = build(program)
    np.testing.assert_array_equal(found(image), packed(program, "portable")(image))


def test_every_operation(build: Compile) -> None:
    model, images = mixed(), exact_images(8, SIZE)
    program, expected = lowered(model, SIZE), expected_logits(model, images)
    assert len(np.unique(expected, axis=0)) > 4
    _, found = build(program)
    np.testing.assert_array_equal(found(images), expected)
    index = max(index for index, o in enumerate(program.operations) if o.kind is Kind.BINARY_CONV)
    _, found = build(sums_of(program, index))
    np.testing.assert_array_equal(found(images[:1])[0], expected_sums(model, images[0])[-1])


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_no_memory_error_or_undefined_behaviour(norm: str, tmp_path: Path) -> None:
    files = to_c(lowered(network("birealnet_small", norm=norm, width=20), 29), "net")
    (tmp_path / "net.h").write_text(files.header)
    (tmp_path / "net.c").write_text(files.source)
    (tmp_path / "main.c").write_text(
        '#include "net.h"\n'
        "static uint8_t pixels[NET_HEIGHT * NET_WIDTH * NET_CHANNELS];\n"
        "static float logits[NET_NUM_LOGITS];\n"
        "int main(void) { net_run(pixels, logits); net_run(pixels, logits); return logits[0] != logits[0]; }\n"
    )
    flags = ["-O1", "-g", "-std=c99", *WARNINGS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [shutil.which("cc") or "gcc", *flags, "main.c", "net.c", "-o", "main", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_needed_kernels(quickstart: Program) -> None:
    source = to_c(quickstart, "net").source
    assert "static void binary_conv(" in source
    assert "sqrt" not in source
    assert [part.splitlines()[0] for part in needed_kernels("mean(")][-1].startswith("static void mean(")


def test_sizes_are_those_of_the_compiler(quickstart: Program, tmp_path: Path) -> None:
    files = to_c(quickstart, "net")
    library = compile_c(files, tmp_path)
    command = ["size", str(library.with_suffix(".o"))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text, data, bss = map(int, output.splitlines()[1].split()[:3])
    assert bss == files.buffer_bytes
    assert 1000 < text + data - files.constant_bytes < 10_000


@pytest.mark.parametrize(("name", "prefix"), [("my net-1", "my_net_1"), ("3d", "network_3d"), ("é", "network__")])
def test_names(name: str, prefix: str, quickstart: Program) -> None:
    files = to_c(quickstart, name)
    assert files.name == prefix
    assert f"void {prefix}_run(const uint8_t *pixels, float *logits);" in files.header


def test_a_description_cannot_end_its_comment(build: Compile) -> None:
    program = lowered(network("birealnet_small"), 28)
    program.description["classes"] = ["*/ int x", "/*", "a\\", "??/", "\n", "ä"]
    _, found = build(program)
    images: NDArray[np.uint8] = random_images(1, 28)
    assert np.isfinite(found(images)).all()


def test_unknown_operations(quickstart: Program) -> None:
    changed = copy.deepcopy(quickstart)
    changed.operations[2].kind = Mock()
    changed.operations[2].kind.name = "PRELU"
    with pytest.raises(ValueError, match="C files of bitfleet do not have the operation PRELU"):
        to_c(changed, "net")
