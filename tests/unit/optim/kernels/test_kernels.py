import concurrent.futures
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitfleet import c_library
from bitfleet.optim import bop2ndorder_step_, bop_step_
from bitfleet.optim.kernels import kernels, triton_kernels
from bitfleet.optim.kernels.bits import pack_signs, unpack_signs
from bitfleet.optim.kernels.kernels import EPS, Correction, bop2ndorder_bits_, flip_packed_
from tests.conftest import run_command

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
CORRECTIONS = ["none", "as_coded", "adam"]
PATHS = [
    pytest.param("kernel", marks=needs_compiler),
    "torch",
    *(["triton"] if triton.knobs.runtime.interpret else []),
]
"""Triton's interpreter, which runs kernels on tensors of the CPU, has to be chosen before Triton is
imported: see `test_under_the_interpreter_of_triton`."""


def update_interpreted(part: kernels.Slice, rates: kernels.Rates, finite: Tensor | None) -> None:
    with np.errstate(all="ignore"):
        triton_kernels.launch_update(*part, **kernels._on_device(rates, finite, part.bits.device), eps=EPS)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every implementation; the kernel on three threads, eager torch in small chunks."""
    if request.param != "kernel":
        monkeypatch.setattr(kernels, "kernel_library", lambda: None)
    if request.param == "triton":
        monkeypatch.setattr(kernels, "_update_chunked_", update_interpreted)
    monkeypatch.setattr(kernels, "num_threads", lambda numel: 3)
    monkeypatch.setattr(kernels, "CHUNK", 1024)
    return str(request.param)


@pytest.fixture
def new_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As in a new process with an empty cache folder."""
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    kernels.kernel_library.cache_clear()
    yield tmp_path / "cache"
    kernels.kernel_library.cache_clear()


def wild_grad(numel: int, generator: torch.Generator) -> Tensor:
    """Zeros of both signs, denormals, infinities and what overflows when squared."""
    grad = torch.randn(numel, generator=generator) * 1e-3
    extremes = [0.0, -0.0, 1e-42, -1e-42, 1e-30, -1e-30, 1e10, -1e25, 3e38, float("inf"), -float("inf"), float("nan")]
    kinds = torch.randint(0, 400, (numel,), generator=generator)
    for kind, value in enumerate(extremes):
        grad[kinds == kind] = value
    # Some that are always tiny, zero or ordinary: once infinite, a moment stays a NaN.
    grad[::7] = torch.randn(len(grad[::7]), generator=generator) * 1e-38
    grad[3::7] = 0.0
    grad[5::7] = torch.randn(len(grad[5::7]), generator=generator)
    return grad


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal in every bit but the payload of a NaN."""
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(0.5).view(torch.int32), b.nan_to_num(0.5).view(torch.int32))


class Twins:
    """The same weights as fp32 under the eager rule and as bits."""

    def __init__(self, numel: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randint(0, 2, (numel,), generator=self.generator).float() * 2 - 1
        self.bits = pack_signs(self.weight)
        self.moments = [torch.zeros(numel), torch.zeros(numel)]
        self.moments_of_bits = [torch.zeros(numel), torch.zeros(numel)]

    def bop2ndorder(self, grad: Tensor, *, correction: Correction = "none", step: int = 1, **rates: float) -> None:
        bop2ndorder_step_(self.weight, grad, *self.moments, **rates, correction=correction, step=step)
        bop2ndorder_bits_(self.bits, grad, *self.moments_of_bits, **rates, correction=correction, step=step)
        self.check_weights()

    def bop(self, grad: Tensor, **rates: float) -> None:
        bop_step_(self.weight, grad, self.moments[0], **rates)
        flip_packed_(self.bits, grad, {"exp_avg": self.moments_of_bits[0]}, rates)
        self.check_weights()

    def check_weights(self) -> None:
        assert torch.equal(unpack_signs(self.bits, torch.empty_like(self.weight)), self.weight)

    def check_moments(self) -> None:
        for expected, moment in zip(self.moments, self.moments_of_bits, strict=True):
            assert_same_bits(moment, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [*CORRECTIONS, "bop"])
def test_bits_of_the_eager_rule(rule: Correction, dtype: torch.dtype, path: str) -> None:
    twins = Twins(2056)
    num_flips = 0
    for step in range(1, 41 if path == "triton" else 201):  # Triton's interpreter is slow
        before = twins.weight.clone()
        grad = wild_grad(2056, twins.generator).to(dtype)
        threshold = 0.02 / step if rule != "as_coded" else 2.0 / step  # schedules move
        if rule == "bop":
            twins.bop(grad, gamma=0.01 / step, threshold=threshold * 1e-3)
        else:
            twins.bop2ndorder(grad, gamma=0.03 / step, sigma=0.01, threshold=threshold, correction=rule, step=step)
        num_flips += int((before != twins.weight).sum())
        if step % 20 == 0:
            twins.check_moments()
    assert num_flips > (400 if path == "triton" else 2000)
    assert twins.moments[0].isnan().any()
    assert (twins.moments[0].abs().lt(1e-39) & twins.moments[0].ne(0)).any()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("numel", [8, 40, 64, 520, 4096, 70_008])
def test_sizes(numel: int) -> None:
    twins = Twins(numel)
    for step in range(1, 6):
        grad = torch.randn(numel, generator=twins.generator)
        twins.bop2ndorder(grad, gamma=0.1, sigma=0.1, threshold=0.3, correction="adam", step=step)
    twins.check_moments()


@pytest.mark.usefixtures("path")
def test_ties_and_nans_become_plus_one() -> None:
    """m = g and v = g^2, so the ratio is +-1 exactly; weights of both signs meet ratios of both
    signs, 0 and NaN."""
    grad = torch.tensor([1.0, -1.0, 0.0, float("nan")]).repeat(32)
    for threshold in (1.0, 0.0, 1.0 - 2**-24, 1.0 + 2**-23):
        twins = Twins(128, seed=1)
        plus = twins.weight == 1
        twins.bop2ndorder(grad, gamma=1.0, sigma=1.0, threshold=threshold)
        if threshold == 1.0:
            assert torch.equal(twins.weight == 1, plus | (grad != 1) & (grad != 0))
        twins = Twins(128, seed=1)
        twins.bop(grad, gamma=1.0, threshold=threshold)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("correction", "square"), [("none", 0.75), ("as_coded", 1.5)])
def test_the_last_bit_of_a_root_decides(correction: Correction, square: float) -> None:
    """After the second step m = g and v = 3/4 g^2: every ratio is the threshold or a neighbour,
    according to how the root rounds."""
    twins = Twins(4096)
    grad = torch.randn(4096, generator=twins.generator)
    for step in (1, 2):
        grad = -grad
        twins.bop2ndorder(grad, gamma=1.0, sigma=0.5, threshold=square**-0.5, correction=correction, step=step)
    twins.check_moments()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_are_rounded_once(dtype: torch.dtype) -> None:
    values = torch.rand(4096, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = np.sqrt(values.numpy())  # rounded as IEEE 754 wants
    if dtype == torch.float32:
        assert np.array_equal(kernels.root(values).numpy(), expected)
    np.testing.assert_allclose(kernels.root(values).numpy(), expected, rtol=np.finfo(expected.dtype).eps)


@pytest.mark.usefixtures("path")
def test_epsilon_decides() -> None:
    """Gradients about as large as epsilon: the ratio is |g| / (|g| + 1e-10)."""
    twins = Twins(4096)
    grad = torch.randn(4096, generator=twins.generator) * 1e-10
    twins.bop2ndorder(grad, gamma=1.0, sigma=1.0, threshold=0.5)
    assert torch.equal(twins.moments[0], grad)


@pytest.mark.usefixtures("path")
def test_a_slice_gives_the_bits_of_the_whole() -> None:
    numel, cuts = 5000, [0, 64, 192, 4992, 5000]
    whole, parts = Twins(numel), Twins(numel)
    for step in range(1, 20):
        grad = torch.randn(numel, generator=whole.generator)
        rates = {"gamma": 0.1, "sigma": 0.01, "threshold": 0.1}
        bop2ndorder_bits_(whole.bits, grad, *whole.moments_of_bits, **rates, correction="adam", step=step)
        for a, b in itertools.pairwise(cuts):
            moments = [moment[a:b] for moment in parts.moments_of_bits]
            bop2ndorder_bits_(parts.bits[a // 8 : b // 8], grad[a:b], *moments, **rates, correction="adam", step=step)
    assert torch.equal(whole.bits, parts.bits)
    assert torch.equal(torch.stack(whole.moments_of_bits), torch.stack(parts.moments_of_bits))


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_number_of_threads_changes_nothing(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "num_threads", lambda numel: num_threads)
    twins = Twins(100_000)
    for step in range(1, 4):
        grad = torch.randn(100_000, generator=twins.generator)
        twins.bop2ndorder(grad, gamma=0.1, sigma=0.1, threshold=0.3, correction="as_coded", step=step)
    twins.check_moments()


def test_bad_tensors() -> None:
    bits, grad, moment = torch.zeros(2, dtype=torch.uint8), torch.zeros(16), torch.zeros(16)
    rates = {"gamma": 0.1, "threshold": 0.1}
    with pytest.raises(ValueError, match="grad .*9 .*multiple of 8"):
        flip_packed_(bits, torch.zeros(9), {"exp_avg": moment}, rates)
    with pytest.raises(ValueError, match=r"bits .*\[2\].* torch.uint8.*\[3\]"):
        flip_packed_(torch.zeros(3, dtype=torch.uint8), grad, {"exp_avg": moment}, rates)
    with pytest.raises(ValueError, match="exp_avg .* torch.bfloat16"):
        flip_packed_(bits, grad, {"exp_avg": moment.bfloat16()}, rates)
    with pytest.raises(ValueError, match=r"grad .*strides \[2\]"):
        flip_packed_(bits, torch.zeros(32)[::2], {"exp_avg": moment}, rates)
    with pytest.raises(ValueError, match="exp_avg .*meta, bits .*cpu"):
        flip_packed_(bits, grad, {"exp_avg": moment.to("meta")}, rates)


@needs_compiler
def test_built_once_and_again_when_damaged(new_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.kernel_library() is not None
    (path,) = new_library.iterdir()
    built = path.stat().st_ino
    kernels.kernel_library.cache_clear()
    assert kernels.kernel_library() is not None
    assert path.stat().st_ino == built
    # Elsewhere: a file that this process has mapped is not read again.
    monkeypatch.setenv("BITFLEET_CACHE", str(new_library / "other"))
    damaged = new_library / "other" / path.name
    damaged.parent.mkdir()
    damaged.write_bytes(path.read_bytes()[:100])
    kernels.kernel_library.cache_clear()
    assert kernels.kernel_library() is not None
    assert damaged.stat().st_size > 100


@needs_compiler
def test_several_build_at_once(new_library: Path) -> None:
    compiler = str(shutil.which("cc"))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        built = [pool.submit(c_library.load_built, kernels.SOURCE, compiler, c_library.FLAGS) for _ in range(4)]
        assert all(future.result().update_bits for future in built)
    assert [path.suffix for path in new_library.iterdir()] == [".so"]


@needs_compiler
def test_without_openmp_on_one_thread(new_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_compiler(monkeypatch, tmp_path, f'case "$*" in *-fopenmp*) exit 1 ;; esac; exec {shutil.which("cc")} "$@"')
    assert kernels.kernel_library() is not None
    twins = Twins(4096)
    twins.bop(torch.randn(4096, generator=twins.generator), gamma=1.0, threshold=0.5)


def fake_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Make `cc` a shell script."""
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "no C compiler"),
        ("echo first >&2; echo sorry >&2; exit 1", "sorry"),
        ('[ "$1" = --version ] || { echo "no such flag" >&2; exit 1; }', "kernels.c .*: no such flag"),
        ('[ "$1" = --version ] || { for last; do :; done; echo > "$last"; }', "BITFLEET_CACHE may name another folder"),
    ],
)
def test_one_warning_then_torch(
    new_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, message: str
) -> None:
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake_compiler(monkeypatch, tmp_path, script)
    with pytest.warns(RuntimeWarning, match=f"eager torch.*{message}"):
        assert kernels.kernel_library() is None
    twins = Twins(1024)
    twins.bop(torch.randn(1024, generator=twins.generator), gamma=1.0, threshold=0.5)  # an error if it warned again


@needs_compiler
def test_folder_that_cannot_be_made(new_library: Path) -> None:
    new_library.write_text("a file in its place")
    with pytest.warns(RuntimeWarning, match="BITFLEET_CACHE"):
        assert kernels.kernel_library() is None


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert c_library._cache_folder() == Path("/own")
    monkeypatch.delenv("BITFLEET_CACHE")
    assert c_library._cache_folder() == Path("/xdg/bitfleet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert c_library._cache_folder() == Path("/home/me/.cache/bitfleet")


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="is under it")
def test_under_the_interpreter_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = run_command([sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "triton", __file__], timeout=300)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 20


def test_packs_and_unpacks(path: str) -> None:
    """Against NumPy, in the order of the bits that ranks exchange."""
    weights = wild_grad(2056, torch.Generator().manual_seed(3))
    expected = np.packbits(weights.numpy() >= 0, bitorder="little")
    bits = torch.empty(257, dtype=torch.uint8)
    pack = triton_kernels.launch_pack if path == "triton" else pack_signs
    pack(weights, bits)
    assert np.array_equal(bits.numpy(), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out = torch.empty(2056, dtype=dtype)
        unpack = triton_kernels.launch_unpack if path == "triton" else unpack_signs
        unpack(bits, out)
        assert torch.equal(out, torch.where(weights >= 0, 1.0, -1.0).to(dtype))


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("corrected", [False, True])
def test_triton_compiles_for_a_gpu_without_fused_multiply_adds(corrected: bool) -> None:
    """As PTX for an H100, which needs no GPU: the operations that round as the CPU does, and
    128-bit loads and stores."""
    kernel = triton_kernels._update
    pointers = ["*u8", "*fp32", "*fp32", "*fp32", *5 * ["*fp32"], "*i1"]
    types = dict(zip(kernel.arg_names, [*pointers, "i32", "fp32", *4 * ["constexpr"]], strict=True))
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(9)}
    constants = {"BF16": False, "SECOND": True, "CORRECTED": corrected, "BLOCK": triton_kernels.BLOCK}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    assert "fma" not in ptx
    assert "div.rn.f32" in ptx
    assert "sqrt.rn.f32" in ptx
    assert not re.search(r"(div|sqrt)\.(approx|full)|\.ftz", ptx)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 6
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 4


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("has_second", [False, True])
def test_nothing_changes_unless_finite(has_second: bool) -> None:
    twins = Twins(520)
    grad = wild_grad(520, twins.generator)
    twins.moments_of_bits[0].normal_(generator=twins.generator)
    state = dict(zip(("exp_avg", "exp_avg_sq")[: 1 + has_second], twins.moments_of_bits, strict=False))
    numbers = {"gamma": 0.5, "sigma": 0.5, "threshold": 0.1}
    before = [tensor.clone() for tensor in (twins.bits, *twins.moments_of_bits)]
    for finite in (False, True):
        kernels.flip_packed_(twins.bits, grad, state, numbers, torch.tensor(finite))
        after = (twins.bits, *twins.moments_of_bits[: 1 + has_second])
        for old, new in zip(before, after, strict=False):
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8)) == (not finite)


@pytest.mark.usefixtures("path")
def test_rates_may_be_tensors() -> None:
    one, other = Twins(520), Twins(520)
    for step in range(1, 5):
        grad = torch.randn(520, generator=one.generator)
        values = {"gamma": 0.1 / step, "sigma": 0.03, "threshold": 0.2, "divisor": 0.7, "divisor_sq": 0.3 / step}
        for twins in (one, other):
            state = dict(zip(("exp_avg", "exp_avg_sq"), twins.moments_of_bits, strict=True))
            numbers = {key: torch.tensor(value) if twins is other else value for key, value in values.items()}
            kernels.flip_packed_(twins.bits, grad, state, numbers)
    assert torch.equal(one.bits, other.bits)
    assert torch.equal(torch.stack(one.moments_of_bits), torch.stack(other.moments_of_bits))


@pytest.fixture
def new_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(kernels._Triton, "works", False)
    monkeypatch.setattr(kernels._Triton, "fails", False)


@pytest.mark.usefixtures("new_triton")
def test_one_warning_where_triton_does_not_work() -> None:
    """Whatever it raises: without Python.h it is a CalledProcessError of gcc."""

    def fail(_: object) -> None:
        raise subprocess.CalledProcessError(1, ["gcc", "launcher.c"])

    with pytest.warns(RuntimeWarning, match="eager torch.*gcc"):
        assert not kernels.on_gpu(fail)
    assert not kernels.on_gpu(pytest.fail)  # neither launched nor warned of again


@pytest.mark.usefixtures("new_triton")
def test_an_error_after_a_launch_that_worked_is_raised() -> None:
    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    assert kernels.on_gpu(lambda _: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.on_gpu(fail)
