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


def test_first_step_of_the_kernel() -> None:
    assert bench_step.first_step("bits", 640) > 0


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its optimizer compiles for half a minute, and its import warns."""
    monkeypatch.setattr(bench_step, "deepspeed_cpu_adam", lambda parameter: None)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("without_deepspeed")
def test_bench_step() -> None:
    rows = bench_step.measure_step(64_000, num_rounds=2)
    assert len({row.name for row in rows}) == len(rows) == 11
    assert all(row.ns_per_weight > 0 for row in rows)
    by_name = {row.name: row for row in rows}
    assert by_name[bench_step.REFERENCE].time_to_adamw == by_name[bench_step.LIMIT].of_limit == 1.0
    assert by_name[bench_step.COPY].of_copy_bandwidth == 1.0
    assert by_name["kernel on bits, fp32 gradients"].time_to_adamw < by_name["eager rule on fp32 weights"].time_to_adamw


@needs_compiler
@pytest.mark.usefixtures("without_deepspeed")
def test_contenders_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for contender in bench_step.contenders(6400).values():
        contender.run()
        contender.run()


def test_read_modify_write_changes_nothing() -> None:
    tensors = [torch.randn(100) for _ in range(4)]
    copies = [tensor.clone() for tensor in tensors]
    bench_step._read_modify_write_(*tensors, torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@needs_compiler
@pytest.mark.slow
def test_first_steps_are_timed_cold_and_warm() -> None:
    assert min(seconds for kind in ("bits", "compiled") for seconds in bench_step.first_steps(kind)) > 0
