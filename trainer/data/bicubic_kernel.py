"""The resize of official.py as one Triton kernel: all windows of a batch in one launch, to the same bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitfleet.trainer.data import official

_TABLE_SIZE = tl.constexpr(official.TABLE_SIZE)
_ROUNDER = tl.constexpr(1.5 * 2**23)  # float32 of that size have no fraction: adding it rounds half to even


def resize_bicubic(windows: Tensor, facts: Tensor, size: int) -> Tensor:
    """Resize windows that lie one after the other, and mirror those that `facts` says: `official.resize_windows` in one launch.

    Args:
        windows: uint8, the bytes of all windows [H, W, 3], on the GPU.
        facts: int64 [N, 4], on the GPU: where the window starts in `windows`, its height, its width, and 1 to mirror it left to
            right. A window has less than 2**31 bytes.
        size: Pixels, height and width of the output.

    Returns:
        float32 [N, size, size, 3], not clipped to 0..255.
    """
    resized = torch.empty((len(facts), size, size, 3), dtype=torch.float32, device=windows.device)
    block = triton.next_power_of_2(3 * size)
    _resize_row[(len(facts), size)](
        windows,
        facts,
        official.weight_table(windows.device),
        resized,
        size,
        BLOCK=block,
        num_warps=max(
            1, min(16, block // 64)
        ),  # two values a thread: each takes 16 bytes by itself, and many registers
        enable_fp_fusion=False,  # TensorFlow rounds each product before it is added
    )
    return resized


@triton.jit  # type: ignore[untyped-decorator]
def _resize_row(windows, facts, table, resized, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of the output of one window: down the columns first, then along the row, taps added one by one."""
    image, y = tl.program_id(0), tl.program_id(1)
    facts += 4 * image
    pixels = windows + tl.load(facts)
    height, width = tl.load(facts + 1).to(tl.int32), tl.load(facts + 2).to(tl.int32)
    value = tl.arange(0, BLOCK)
    inside = value < 3 * size
    x, channel = value // 3, value % 3
    x = tl.where(tl.load(facts + 3) != 0, size - 1 - x, x)
    first_row, row_offset = _first_tap(y, height, size)
    first_column, column_offset = _first_tap(x, width, size)
    total = tl.zeros([BLOCK], tl.float32)
    for column_tap in tl.static_range(4):
        column = tl.minimum(tl.maximum(first_column + column_tap, 0), width - 1)
        column_weight = tl.load(table + _table_index(column_offset, column_tap), mask=inside, other=0.0)
        line = tl.zeros([BLOCK], tl.float32)
        for row_tap in tl.static_range(4):
            row = tl.minimum(tl.maximum(first_row + row_tap, 0), height - 1)
            pixel = tl.load(pixels + (row * width + column) * 3 + channel, mask=inside, other=0).to(tl.float32)
            term = pixel * tl.load(table + _table_index(row_offset, row_tap))
            line = line + term if row_tap > 0 else term
        line = line * column_weight
        total = total + line if column_tap > 0 else line
    tl.store(resized + (image.to(tl.int64) * size + y) * 3 * size + value, total, mask=inside)


@triton.jit
def _first_tap(index, side, size):  # type: ignore[no-untyped-def]
    """The first of the four pixels that pixel `index` of the output is made of, and its distance to the second in 1/1024."""
    scale = tl.div_rn(side.to(tl.float32), (size + tl.zeros_like(side)).to(tl.float32))
    position = index.to(tl.float32) * scale
    second = tl.floor(position)
    offset = ((position - second) * _TABLE_SIZE + _ROUNDER) - _ROUNDER
    return second.to(tl.int32) - 1, offset.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _table_index(offset, tap: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the weight of tap 0 to 3 lies in the table: at 1 + offset, offset, 1 - offset and 2 - offset pixels."""
    if tap == 0:
        return offset + _TABLE_SIZE
    elif tap == 1:
        return offset
    else:
        return (tap - 1) * _TABLE_SIZE - offset
