"""Run exported networks without torch: `bitfleet.packed.load(FILE)(images)`."""

from bitfleet.packed.program import read_description
from bitfleet.packed.runner import PackedNetwork, load

__all__ = ["PackedNetwork", "load", "read_description"]
