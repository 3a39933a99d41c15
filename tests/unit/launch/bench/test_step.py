import shutil

import pytest
import torch

from bitfleet.launch.bench import step as bench_step

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None or shutil.which("g++") is None, reason="no compiler")


@needs_compiler
def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "kernel_library", lambda: None)
    with pytest.raises(ValueError, match="compiler"):
        bench_step.measure_step(64, 1)


@needs_compiler
@pytest.mark.slow
def test_bench_step() -> None:
    rows = bench_step.measure_step(64_000, num_rounds=2)
    by_name = {row["what"]: row for row in rows}
    assert len(by_name) == len(rows) == 7
    assert all(row["ns_per_weight"] > 0 for row in rows)
    assert by_name[bench_step.REFERENCE]["time_to_adamw"] == by_name[bench_step.COPY]["of_copy_bandwidth"] == 1.0
    assert {bench_step.ON_BITS, "eager rule on fp32 weights"} <= set(by_name)


@needs_compiler
def test_contenders_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    contenders = bench_step.contenders(6400)
    assert {bench_step.REFERENCE, bench_step.COPY, bench_step.ON_BITS} <= set(contenders)
    for _, run in contenders.values():
        run()
        run()
