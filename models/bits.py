"""Pack boolean tensors to bits, eight a byte, least significant bit first.

What a binary network keeps for its backward pass is mostly yes or no (the sign of an activation, |x| <= 1); as bits it
takes 1/32 of the floats. Packing multiplies eight booleans, read as one 64-bit word, by a constant that gathers them
in the top byte; unpacking looks whole bytes up in a table of 256 rows. Both were the fastest of the eager formulations
measured, and run on any device.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BitLayout", "pack_bits", "unpack_bits"]

# Byte i of the word (0 or 1) times bit 56 - 7 i of this constant lands on bit 56 + i; no two products share a bit, so
# nothing carries.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))


class BitLayout(NamedTuple):
    """Shape and strides of a packed tensor: its memory format survives the round trip."""

    shape: torch.Size
    stride: tuple[int, ...]


def pack_bits(flags: Tensor) -> tuple[Tensor, BitLayout]:
    """Pack a boolean tensor in the order of its memory.

    Args:
        flags: bool, any shape. Contiguous and channels_last tensors are read in place, others are copied first.

    Returns:
        uint8 of shape [ceil(numel / 8)], and the layout that `unpack_bits` needs. The unused bits of the last byte
        are 0.
    """
    if not flags.is_contiguous() and not flags.is_contiguous(memory_format=_channels_last(flags)):
        flags = flags.contiguous()
    layout = BitLayout(flags.shape, flags.stride())
    flat = flags.as_strided((flags.numel(),), (1,))
    if flat.numel() % 8 or flat.storage_offset() % 8:  # F.pad copies, so the words are aligned as well
        flat = F.pad(flat, (0, -flat.numel() % 8 or 8))
    gathered = flat.view(torch.int64) * _GATHER
    # The top byte of a little-endian word is its last byte: one strided copy instead of a shift and a conversion.
    return gathered.view(torch.uint8)[7::8][: (flags.numel() + 7) // 8].contiguous(), layout


def unpack_bits(bits: Tensor, layout: BitLayout, *, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """Undo `pack_bits`, with a value in place of each bit.

    Args:
        bits: uint8 [ceil(numel / 8)].
        layout: what `pack_bits` returned.
        low: value of a 0 bit.
        high: value of a 1 bit.
        dtype: type of the result.

    Returns:
        `dtype`, shape and strides of the packed tensor.
    """
    values = _table(low, high, dtype, bits.device).index_select(0, bits.int())
    return values.as_strided(layout.shape, layout.stride)


def _channels_last(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


@lru_cache
def _table(low: float, high: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: row b holds the eight values of byte b."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    bit = (byte >> torch.arange(8, device=device)) & 1
    return torch.where(bit == 1, high, low).to(dtype)
