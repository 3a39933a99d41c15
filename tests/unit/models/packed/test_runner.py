"""A network in Python: copies, and threads that share one."""

import concurrent.futures
import copy
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from bitfleet.c_library import CLibraryError
from bitfleet.packed import runner
from bitfleet.packed.program import to_bytes
from bitfleet.packed.runner import PackedNetwork
from tests.unit.models.packed.programs import network, random_image


@pytest.fixture
def shared() -> PackedNetwork:
    return PackedNetwork(to_bytes(network("birealnet18")), {"classes": ["a"]})


def images(number: int) -> np.ndarray:
    program = network("birealnet18")
    return np.stack([random_image(program, seed) for seed in range(number)])


def test_threads_share_a_network(shared: PackedNetwork) -> None:
    batch = images(8)
    expected = shared(batch)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            rows = pool.map(lambda image: shared(image[None])[0], batch)
            np.testing.assert_array_equal(np.stack(list(rows)), expected)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_a_network_of_its_own(duplicate, shared: PackedNetwork) -> None:
    batch = images(2)
    other = duplicate(shared)
    expected, description = other(batch), other.description
    del other
    np.testing.assert_array_equal(shared(batch), expected)
    assert description == shared.description


def test_threads_load_networks_for_several_instruction_sets() -> None:
    content, wanted = to_bytes(network("birealnet18")), ["portable", None] * 50

    def instructions(path: str | None) -> str:
        return PackedNetwork(content, {}, path).instructions

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(instructions, wanted)) == ["portable", instructions(None)] * 50


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_compiler_without_openmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = f'case "$*" in *-fopenmp*) exit 1 ;; esac; exec {shutil.which("cc")} "$@"'
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path))
    assert runner.library.__wrapped__().packed_path() in (b"avx512", b"avx2", b"neon", b"portable")


def test_no_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CLibraryError, match=r"runs packed networks cannot be built: no C compiler .*: install gcc$"):
        runner.library.__wrapped__()
    assert issubclass(CLibraryError, ValueError)  # which commands print in a line
