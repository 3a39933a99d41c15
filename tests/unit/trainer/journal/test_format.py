"""The form of a flip journal's files: any density of flips comes back, and what was changed is
noticed."""

from pathlib import Path

import numpy as np
import pytest

from bitfleet.trainer.config import TrainConfig, from_dict, to_dict
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.journal.config import JournalConfig
from bitfleet.trainer.journal.format import (
    BITMAP,
    FRAME_BYTES,
    GAPS,
    WIDE_GAPS,
    Layout,
    Piece,
    apply_,
    encode,
    header,
    parse_frame,
    read_header,
)


@pytest.mark.parametrize(
    ("flip_ratio", "kind", "most"),
    [(1.0, BITMAP, 0.126), (0.5, BITMAP, 1.01), (0.1, BITMAP, 0.5), (0.03, GAPS, 0.21), (0.002, GAPS, 0.025)],
)
def test_flips_come_back(flip_ratio: float, kind: int, most: float) -> None:
    """`most` of the bytes of a bitmap; the entropies are 0 (Huffman codes have no less than a bit),
    1, 0.469, 0.194, 0.021."""
    generator = np.random.default_rng(0)
    flips = np.packbits(generator.random(1 << 18) < flip_ratio, bitorder="little")
    signs = generator.integers(0, 256, flips.size, dtype=np.uint8)
    frame = encode(7, flips)
    facts = parse_frame(frame[:FRAME_BYTES], 100)
    assert facts is not None
    assert (facts.kind, facts.step, facts.offset) == (kind, 7, 100 + FRAME_BYTES)
    assert facts.num_flips == int(np.unpackbits(flips).sum())
    assert facts.length == len(frame) - FRAME_BYTES <= most * flips.size
    after = signs.copy()
    apply_(after, facts.kind, facts.num_flips, frame[FRAME_BYTES:])
    assert np.array_equal(after, signs ^ flips)


@pytest.mark.parametrize("where", [[], [0], [(1 << 18) - 1], [0, 1, 256, 511, 512, 768, 100_000], [254, 510, 255_000]])
def test_gaps_of_every_length(where: list[int]) -> None:
    """Around the escape of 255, over several low bytes, none, and at both ends."""
    flags = np.zeros(1 << 18, np.uint8)
    flags[where] = 1
    flips = np.packbits(flags, bitorder="little")
    frame = encode(1, flips)
    facts = parse_frame(frame[:FRAME_BYTES], 0)
    assert facts is not None
    assert facts.kind == WIDE_GAPS
    signs = np.zeros_like(flips)
    apply_(signs, facts.kind, facts.num_flips, frame[FRAME_BYTES:])
    assert np.array_equal(signs, flips)
    few = np.packbits(flags[: 1 << 10], bitorder="little")  # narrow gaps
    if few.any():
        frame, signs = encode(1, few), np.zeros_like(few)
        facts = parse_frame(frame[:FRAME_BYTES], 0)
        assert facts is not None
        assert facts.kind == GAPS
        apply_(signs, facts.kind, facts.num_flips, frame[FRAME_BYTES:])
        assert np.array_equal(signs, few)


def test_every_changed_bit_of_a_frame_s_head_is_noticed() -> None:
    head = encode(3, np.array([1, 0, 0, 128], np.uint8))[:FRAME_BYTES]
    assert parse_frame(head, 0) is not None
    for bit in range(8 * FRAME_BYTES):
        changed = bytearray(head)
        changed[bit // 8] ^= 1 << bit % 8
        assert parse_frame(bytes(changed), 0) is None


def test_payload_that_does_not_fit_is_refused() -> None:
    frame = encode(1, np.array([0, 0, 0, 0, 0, 0, 0, 128], np.uint8))
    with pytest.raises(ValueError, match="1 flips .* 8 weights"):
        apply_(np.zeros(1, np.uint8), GAPS, 1, frame[FRAME_BYTES:])
    frame = encode(1, np.full(8, 255, np.uint8))
    with pytest.raises(ValueError, match="8 bytes .* 16"):
        apply_(np.zeros(16, np.uint8), BITMAP, 64, frame[FRAME_BYTES:])


def test_header(tmp_path: Path) -> None:
    layout = Layout(5, 1, 2, 64, {"conv.weight": [4, 3, 3, 3]}, [Piece("conv.weight", 64, 0, 44)])
    path = tmp_path / "part"
    path.write_bytes(header(layout) + b"frames")
    read, offset = read_header(path)
    assert read == layout
    assert path.read_bytes()[offset:] == b"frames"
    path.write_bytes(header(layout).replace(b"conv", b"comv"))
    with pytest.raises(ValueError, match="part .*damaged.*header"):
        read_header(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="part .*flip journal"):
        read_header(path)


def test_config() -> None:
    from bitfleet.configs import load_config

    config = load_config("fashion_quickstart")
    old = to_dict(config)
    del old["journal"]  # of a run from before there was one
    assert isinstance(from_dict(old), TrainConfig)
    assert not from_dict(old).journal.enabled
    import dataclasses

    with pytest.raises(ValueError, match="journal.enabled .*engine.sharding .*zero1"):
        dataclasses.replace(config, engine=EngineConfig(sharding="zero1"), journal=JournalConfig(enabled=True))
