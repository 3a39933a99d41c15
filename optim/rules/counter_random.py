"""Random numbers by position: a pure function of seed, parameter name and element.

State that starts at random must have the same bits in the plain optimizer and in every cut into
slices, on any number of ranks. A generator that is read in order cannot do that; here number i is a
hash of i. The hash is splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014) in torch's int64, whose products wrap around.
"""

import hashlib

import torch
from torch import Tensor

__all__ = ["uniform"]

_BITS = 23
"""Bits per number; with the half that is added they fill the 24 bits of a float32."""


def uniform(seed: int, name: str, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """Elements `first` ... `first + count - 1` of the sequence that belongs to `seed` and `name`.

    Args:
        seed: of the run.
        name: of the parameter.
        first: 0-based number of the first element.
        count: how many.
        device: where the result is.

    Returns:
        fp32 [count], uniform on the odd multiples of 2^-24 in (0, 1), so neither 0 nor 1.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    mixed = torch.arange(first + 1, first + count + 1, device=device) * _signed(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    mixed ^= _shifted(mixed, 31)
    return (_shifted(mixed, 64 - _BITS).float() + 0.5) * 2.0**-_BITS


def _shifted(words: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's own carries the sign along."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
