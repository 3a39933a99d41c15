import hashlib

import torch

from bitfleet.optim.rules.counter_random import uniform

MASK = (1 << 64) - 1


def splitmix64(key: int, index: int) -> int:
    """Number `index` of the generator as published, in Python's integers."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_gives_the_published_numbers() -> None:
    """First outputs of splitmix64.c with the seed 1234567."""
    assert [splitmix64(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]


def test_numbers_are_those_of_splitmix64() -> None:
    key = int.from_bytes(hashlib.blake2b(b"7/blocks.0.weight", digest_size=8).digest(), "little")
    numbers = uniform(7, "blocks.0.weight", 1_000_000_000, 500)
    expected = [((splitmix64(key, 1_000_000_000 + i) >> 41) + 0.5) / (1 << 23) for i in range(500)]
    assert numbers.tolist() == expected


def test_a_stretch_is_a_stretch_of_the_whole() -> None:
    whole = uniform(0, "w", 0, 1000)
    assert torch.equal(torch.cat([uniform(0, "w", 0, 7), uniform(0, "w", 7, 600), uniform(0, "w", 607, 393)]), whole)


def test_seed_and_name_give_other_numbers() -> None:
    numbers = [uniform(*key, 0, 1000) for key in ((0, "a"), (1, "a"), (0, "b"))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (numbers[a] == numbers[b]).sum() < 3


def test_numbers_are_uniform_and_inside() -> None:
    numbers = uniform(0, "w", 0, 1 << 17)
    assert 0.0 < numbers.min() < 1e-3
    assert 0.999 < numbers.max() < 1.0
    counts = torch.histc(numbers, 16, 0.0, 1.0)
    assert ((counts / (1 << 13) - 1).abs() < 0.06).all()  # 5 sigma
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 0.02
