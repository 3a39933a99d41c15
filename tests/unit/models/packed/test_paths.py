"""Every instruction set computes the same, in C without Python, and touches no other memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bitfleet.packed.program import Program, to_bytes
from bitfleet.packed.runner import PackedNetwork
from tests.unit.models.packed.native import LIBRARY, SANITIZERS, SOURCES, THREADS, compile_c, drive, need, results
from tests.unit.models.packed.programs import NETWORKS, SMALLEST, network, random_image, random_program

DRIVER = (SOURCES / "driver.c", LIBRARY / "packed.c")
RANDOM = range(40)


def programs(names: Sequence[str]) -> dict[str, Program]:
    return {name: network(name) for name in names} | {f"random{seed}": random_program(seed) for seed in RANDOM}


@pytest.fixture(scope="module")
def small() -> dict[str, Program]:
    return programs(SMALLEST)


def test_paths_of_this_cpu_agree_with_python(tmp_path: Path) -> None:
    compiler = need("gcc", "gcc")
    driver = compile_c(tmp_path / "driver", DRIVER, "-O2", *THREADS, compiler=compiler)
    programs_ = {name: network(name) for name in NETWORKS}
    paths = drive([driver], programs_, tmp_path, 3)
    assert paths[-1] == "portable"
    for name, program in programs_.items():
        sums, logits = results(program, name, tmp_path)
        runner = PackedNetwork(to_bytes(program), {}, paths[0])
        image = random_image(program, 0)
        assert np.array_equal(runner(image[None])[0], logits)
        found = [runner.sums(image, index) for index in range(runner.num_operations)]
        assert np.array_equal(np.concatenate(found), sums)
        assert len(sums) > 0


@pytest.mark.slow
def test_sanitizers(tmp_path: Path, small: dict[str, Program]) -> None:
    compiler = need("gcc", "gcc")
    driver = compile_c(tmp_path / "driver", DRIVER, *SANITIZERS, compiler=compiler)
    assert "portable" in drive([driver], small, tmp_path, 3)


def test_clang(tmp_path: Path, small: dict[str, Program]) -> None:
    compiler = need("clang", "clang")
    driver = compile_c(tmp_path / "driver", DRIVER, "-O1", "-Wno-unknown-pragmas", compiler=compiler)
    assert "portable" in drive([driver], small, tmp_path, 1)


def test_neon(tmp_path: Path, small: dict[str, Program]) -> None:
    """NEON and portable C on ARM give the integers and logits of portable C on this CPU."""
    compiler = need("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    emulator = need("qemu-aarch64", "qemu-user")
    driver = compile_c(tmp_path / "driver", DRIVER, "-O2", *THREADS, "-static", compiler=compiler)
    assert drive([emulator, driver], small, tmp_path, 2) == ["neon", "portable"]
    for name, program in small.items():
        sums, logits = results(program, name, tmp_path)
        runner, image = PackedNetwork(to_bytes(program), {}, "portable"), random_image(program, 0)
        found = [runner.sums(image, index) for index in range(runner.num_operations)]
        assert np.array_equal(np.concatenate(found), sums), name
        (expected,) = runner(image[None])
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max(), name
