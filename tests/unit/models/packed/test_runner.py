"""A network in Python: copies, and threads that share one."""

import concurrent.futures
import copy
import pickle

import numpy as np
import pytest

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
