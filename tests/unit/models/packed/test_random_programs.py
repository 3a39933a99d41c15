"""Random programs give what numpy computes, on every instruction set of this CPU."""

import dataclasses

import numpy as np
import pytest

from bitfleet.packed.program import Array, Flag, Kind, Operation, to_bytes
from bitfleet.packed.runner import PackedNetwork
from tests.unit.models.packed.networks import PATHS
from tests.unit.models.packed.programs import random_image, random_program
from tests.unit.models.packed.reference import Results, run

NUM_PROGRAMS = 300
TOLERANCE = 1e-5


@dataclasses.dataclass
class Case:
    """A program and what it should compute."""

    operations: list[Operation]
    content: bytes
    image: Array
    expected: Results


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    found = []
    for seed in range(NUM_PROGRAMS):
        program = random_program(seed)
        image = random_image(program, seed)
        expected = run(program.operations, image)
        if not expected.has_ties:
            found.append(Case(program.operations, to_bytes(program), image, expected))
    return found


@pytest.mark.parametrize("path", PATHS)
def test_random_programs(path: str, cases: list[Case]) -> None:
    for number, case in enumerate(cases):
        network = PackedNetwork(case.content, {}, path)
        binary = [index for index, o in enumerate(case.operations) if o.kind is Kind.BINARY_CONV]
        for index, sums in zip(binary, case.expected.sums, strict=True):
            assert np.array_equal(network.sums(case.image, index), sums.reshape(-1)), (number, index)
        logits = case.expected.logits
        for num_threads in (1, 2, 3):
            (found,) = network(case.image[None], num_threads)
            assert np.abs(found - logits).max() <= TOLERANCE * np.abs(logits).max(), (number, num_threads)


def test_random_programs_have_every_operation(cases: list[Case]) -> None:
    operations = [operation for case in cases for operation in case.operations]
    assert len(cases) > NUM_PROGRAMS // 2
    assert {operation.kind for operation in operations} == set(Kind)
    for name in ("other", "signs", "factor", "offset", "shift", "slope", "after", "sign_shift"):
        assert any(getattr(operation, name) is not None for operation in operations), name
    for flag in Flag:
        assert any(flag in operation.flags for operation in operations), flag
    assert any(operation.kind is Kind.SIGN and operation.offset is not None for operation in operations)
