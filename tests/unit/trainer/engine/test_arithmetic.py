"""Check what a run sets in torch; on a CPU the flags of CUDA can be read as well, they only mean
nothing."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bitfleet.trainer.engine.arithmetic import remark_on_precision, use_arithmetic
from bitfleet.trainer.engine.config import EngineConfig

GPU = torch.device("cuda", 0)
MATMUL = torch.backends.cuda.matmul


def flags() -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    return {
        "conv": cudnn.allow_tf32,
        "matmul": MATMUL.allow_tf32,
        "bf16 sums": MATMUL.allow_bf16_reduced_precision_reduction,
        "fp16 sums": MATMUL.allow_fp16_reduced_precision_reduction,
        "deterministic": cudnn.deterministic,
        "benchmark": cudnn.benchmark,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
    }


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    yield
    torch.backends.cudnn.allow_tf32, MATMUL.allow_tf32 = before["conv"], before["matmul"]
    MATMUL.allow_bf16_reduced_precision_reduction = before["bf16 sums"]
    MATMUL.allow_fp16_reduced_precision_reduction = before["fp16 sums"]
    torch.backends.cudnn.deterministic = before["deterministic"]
    torch.backends.cudnn.benchmark = before["benchmark"]
    torch.use_deterministic_algorithms(before["algorithms"])
    torch.utils.deterministic.fill_uninitialized_memory = before["fill"]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert flags() == before


def test_a_cpu_without_instructions_for_a_precision_is_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", lambda: False)
        assert f"no instructions for {precision}" in remark_on_precision(precision, "cpu")
        assert remark_on_precision(precision, "cuda") == ""
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", lambda: True)
        assert remark_on_precision(precision, "cpu") == ""
    for precision in ("fp32", "auto"):
        assert remark_on_precision(precision, "cpu") == ""


@pytest.mark.parametrize(
    ("precision", "tf32"), [("fp32", False), ("tf32", True), ("auto", True), ("bf16", True), ("fp16", True)]
)
def test_precision_of_a_gpu(precision: Any, tf32: bool) -> None:
    use_arithmetic(GPU, EngineConfig(precision=precision))
    found = flags()
    assert (found["conv"], found["matmul"]) == (tf32, tf32)
    assert (found["bf16 sums"], found["fp16 sums"]) == (False, False)
    # What torch itself, torch.compile and DeepSpeed read: a mixture of old and new names would
    # raise.
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


def test_repeatable_or_fast() -> None:
    import torch._inductor.config as inductor

    use_arithmetic(GPU, EngineConfig(deterministic=False))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    found = flags()
    assert (found["deterministic"], found["benchmark"], found["algorithms"], inductor.deterministic) == (0, 1, 0, 0)
    use_arithmetic(GPU, EngineConfig())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    found = flags()
    assert (found["deterministic"], found["benchmark"], found["algorithms"], inductor.deterministic) == (1, 0, 1, 1)
    assert found["fill"] is False
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_on_a_cpu_nothing_is_set() -> None:
    before = flags()
    use_arithmetic(torch.device("cpu"), EngineConfig(deterministic=False))
    assert flags() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(ValueError, match='"tf32" .*GPU'):
        use_arithmetic(torch.device("cpu"), EngineConfig(precision="tf32"))
