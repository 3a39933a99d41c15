"""Damaged programs are refused or run, with no fault."""

from pathlib import Path

from bitfleet.packed.program import to_bytes
from tests.unit.models.packed.native import SANITIZERS, SOURCES, compile_c, need, run_c
from tests.unit.models.packed.programs import SMALLEST, network, random_program

COUNT = 10_000


def test_damaged_programs(tmp_path: Path) -> None:
    compiler = need("gcc", "gcc")
    fuzz = compile_c(tmp_path / "fuzz", [SOURCES / "fuzz.c"], *SANITIZERS, compiler=compiler)
    files = []
    for number, program in enumerate([*map(network, SMALLEST), *map(random_program, range(20))]):
        files.append(tmp_path / f"{number}.program")
        files[-1].write_bytes(to_bytes(program))
    refused, accepted, large = map(int, run_c(fuzz, "1", str(COUNT), *files).split())
    assert refused + accepted + large == COUNT
    assert refused > COUNT // 10
    assert accepted > COUNT // 10
