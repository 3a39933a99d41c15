"""What the benchmark of the flip journal counts and prints; nothing is timed."""

import pytest

from bitfleet.launch.bench.journal import Cost, encodings, format_journal
from bitfleet.trainer.ranks.collectives import Ranks


def test_encodings_are_near_the_entropy() -> None:
    rows = encodings(1 << 20, (0.5, 0.03, 0.002))
    assert [row.flip_ratio for row in rows] == [0.5, 0.03, 0.002]
    for row in rows:
        assert row.entropy_bytes * 0.95 < row.num_bytes < row.entropy_bytes * 1.15, row


def test_format() -> None:
    cost = Cost([1.0, 2.0, 4.0], [1.1, 2.4, 4.0], [0.5] * 3, [0.6] * 3, 10, 2000, 20.0, 25.5)
    lines = format_journal("fashion", Ranks(0, 2, 0, 2), cost, encodings(64, (0.5,))).splitlines()
    assert lines[0] == "fashion on 2 ranks, 2,000 binary weights, median of 3 rounds of 10 steps"
    assert lines[2].split() == ["step", "200.00", "240.00", "1.1000", "1.000", "to", "1.200"]
    assert lines[3].split()[:7] == ["CPU", "time", "of", "rank", "0", "50.00", "60.00"]
    assert lines[4].split()[-2:] == ["20", "(1.0000%)"]
    assert len(lines) == 10
    assert float(lines[-1].split()[0].rstrip("%")) == pytest.approx(50)
