"""Run the resize of preprocessing.py as one Triton kernel per batch, with equal bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitfleet.trainer.data import preprocessing

_TABLE_SIZE = tl.constexpr(preprocessing.TABLE_SIZE)
_ROUNDER = tl.constexpr(1.5 * 2**23)  # float32 of that size have no fraction: adding it rounds half to even


def resize_bicubic(windows: Tensor, table: Tensor, size: int) -> Tensor:
    """Resize consecutive windows and mirror some: `preprocessing.resize_windows` in one launch.

    Args:
        windows: uint8, the bytes of all windows [H, W, 3], on the GPU.
        table: int64 [N, 4], on the GPU: start of the window in `windows`, height, width, and 1 to
            mirror it left to right. A window has less than 2**31 bytes.
        size: Height and width of the output, pixels.

    Returns:
        float32 [N, size, size, 3], not clipped to 0..255.
    """
    resized = torch.empty((len(table), size, size, 3), dtype=torch.float32, device=windows.device)
    block = triton.next_power_of_2(3 * size)
    _resize_row[(len(table), size)](
        windows,
        table,
        preprocessing.weight_table(windows.device),
        resized,
        size,
        BLOCK=block,
        # Two values per thread: each loads its 16 bytes separately and takes many registers.
        num_warps=max(1, min(16, block // 64)),
        enable_fp_fusion=False,  # TensorFlow rounds each product before it is added
    )
    return resized


@triton.jit  # type: ignore[untyped-decorator]
def _resize_row(windows, rows, weights, resized, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute an output row of a window: down the columns, then along the row, tap by tap."""
    image, y = tl.program_id(0), tl.program_id(1)
    rows += 4 * image
    pixels = windows + tl.load(rows)
    height, width = tl.load(rows + 1).to(tl.int32), tl.load(rows + 2).to(tl.int32)
    value = tl.arange(0, BLOCK)
    inside = value < 3 * size
    x, channel = value // 3, value % 3
    x = tl.where(tl.load(rows + 3) != 0, size - 1 - x, x)
    first_row, row_offset = _first_tap(y, height, size)
    first_column, column_offset = _first_tap(x, width, size)
    total = tl.zeros([BLOCK], tl.float32)
    for column_tap in tl.static_range(4):
        column = tl.minimum(tl.maximum(first_column + column_tap, 0), width - 1)
        column_weight = tl.load(weights + _weight_index(column_offset, column_tap), mask=inside, other=0.0)
        line = tl.zeros([BLOCK], tl.float32)
        for row_tap in tl.static_range(4):
            row = tl.minimum(tl.maximum(first_row + row_tap, 0), height - 1)
            pixel = tl.load(pixels + (row * width + column) * 3 + channel, mask=inside, other=0).to(tl.float32)
            term = pixel * tl.load(weights + _weight_index(row_offset, row_tap))
            line = line + term if row_tap > 0 else term
        line = line * column_weight
        total = total + line if column_tap > 0 else line
    tl.store(resized + (image.to(tl.int64) * size + y) * 3 * size + value, total, mask=inside)


@triton.jit
def _first_tap(index, side, size):  # type: ignore[no-untyped-def]
    """Return the first tap of output pixel `index`, and its distance to the second in 1/1024."""
    scale = tl.div_rn(side.to(tl.float32), (size + tl.zeros_like(side)).to(tl.float32))
    position = index.to(tl.float32) * scale
    second = tl.floor(position)
    offset = ((position - second) * _TABLE_SIZE + _ROUNDER) - _ROUNDER
    return second.to(tl.int32) - 1, offset.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _weight_index(offset, tap: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the weight's index of tap 0 to 3, at 1 + offset, offset, 1 - offset, 2 - offset."""
    if tap == 0:
        return offset + _TABLE_SIZE
    elif tap == 1:
        return offset
    else:
        return (tap - 1) * _TABLE_SIZE - offset
