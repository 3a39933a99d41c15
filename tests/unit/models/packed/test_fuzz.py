"""Damaged programs are refused or run, with no fault."""

from pathlib import Path

import pytest

from bitfleet.packed.program import to_bytes
from tests.unit.models.packed.native import SANITIZERS, SOURCES, compile_c, need, run_c
from tests.unit.models.packed.programs import SMALLEST, network, random_program

COUNTS = [500, pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_programs(count: int, tmp_path: Path) -> None:
    compiler = need("gcc", "gcc")
    fuzz = compile_c(tmp_path / "fuzz", [SOURCES / "fuzz.c"], *SANITIZERS, compiler=compiler)
    files = []
    for number, program in enumerate([*map(network, SMALLEST), *map(random_program, range(12))]):
        files.append(tmp_path / f"{number}.program")
        files[-1].write_bytes(to_bytes(program))
    printed = run_c(fuzz, str(count), str(count), *files, OMP_WAIT_POLICY="passive")
    refused, accepted, large = map(int, printed.split())
    assert refused + accepted + large == count
    assert refused > count // 10
    assert accepted > count // 10
