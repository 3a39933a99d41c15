"""The Triton kernel of the official resize: its bits under Triton's interpreter, and what it
becomes for a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SAME_BITS = """
import numpy as np
import torch
from bitfleet.trainer.data.bicubic_kernel import resize_bicubic
from bitfleet.trainer.data.preprocessing import resize_windows, window_table

rng = np.random.default_rng(0)
shapes = [(1, 1, 3), (3, 7, 3), (75, 100, 3), (6, 6, 3), (333, 41, 3)]
windows = [torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
flips = np.array([0, 1, 1, 0, 1], np.int32)
whole = torch.cat([window.flatten() for window in windows])
for size in (1, 6):
    resized = resize_bicubic(whole, window_table(shapes, flips), size)
    expected = resize_windows(windows, flips, size)
    assert resized.shape == expected.shape == (len(shapes), size, size, 3)
    assert torch.equal(resized.view(torch.int32), expected.view(torch.int32)), size
"""

FOR_A_GPU = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bitfleet.trainer.data.bicubic_kernel import _resize_row

types = {"windows": "*u8", "rows": "*i64", "weights": "*fp32", "resized": "*fp32", "size": "i32", "BLOCK": "constexpr"}
source = ASTSource(fn=_resize_row, signature=types, constexprs={"BLOCK": 1024})
options = {"enable_fp_fusion": False, "num_warps": 16}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def run(code: str, tmp_path: Path, **environment: str) -> str:
    """Return what a new process prints: Triton reads its settings when a kernel is defined."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreted_kernel_has_the_bits_of_the_torch_version(tmp_path: Path) -> None:
    run(SAME_BITS, tmp_path, TRITON_INTERPRET="1")


def test_no_product_is_added_before_it_is_rounded(tmp_path: Path) -> None:
    """As compiled for an H100, which takes no GPU: no fused multiply-add, no approximate
    division."""
    ptx = run(FOR_A_GPU, tmp_path)
    arithmetic = set(re.findall(r"\b(?:fma|mad|mul|div|add|sub|rcp)\.[a-z.]*f32", ptx))
    assert arithmetic == {"mul.rn.f32", "add.rn.f32", "sub.rn.f32", "div.rn.f32"}
