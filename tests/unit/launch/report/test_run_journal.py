"""The flip journal in a report, against flips that are written here."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bitfleet.launch.report import write_report
from bitfleet.launch.report.run_journal import read_journal
from bitfleet.launch.report.run_results import read_run
from bitfleet.launch.report.run_section import journal_blocks
from bitfleet.trainer.journal import format as journal_format
from bitfleet.trainer.journal.format import FOLDER, SIGNS, Bytes, Layout, Piece
from tests.unit.launch.report import synthetic

LAYOUT = Layout(0, 0, 2, 64, {"a": [4, 4], "b": [6, 8]}, [])
PIECES = (
    [Piece("a", 0, 0, 16), Piece("b", 0, 16, 16)],  # rank 0: all of a, the beginning of b
    [Piece("b", 16, 0, 32)],
)
FLIPS = {  # step -> flipped weights of each rank's slices, counted with their padding
    1: ([0, 1, 2, 16], [31]),
    2: ([0], []),
    4: ([17], [31, 0]),
}


def bits(positions: list[int]) -> Bytes:
    flags = np.zeros(64, np.uint8)
    flags[positions] = 1
    return np.packbits(flags, bitorder="little")


def write_journal(run: Path, num_steps: int = 5) -> None:
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    for rank, pieces in enumerate(PIECES):
        layout = LAYOUT._replace(rank=rank, pieces=pieces)
        content = journal_format.header(layout) + journal_format.frame(SIGNS, 0, 0, bits([3]).tobytes())
        for step in range(1, num_steps + 1):
            content += journal_format.encode(step, bits(FLIPS.get(step, ([], []))[rank]))
        (run / FOLDER / journal_format.file_name(1, 0, rank, 2)).write_bytes(content)


def test_ages_and_flips_of_every_layer(tmp_path: Path) -> None:
    write_journal(tmp_path)
    journal = read_journal(tmp_path)
    assert (journal.first_step, journal.last_step, journal.interval) == (0, 5, 1)
    assert journal.last_flips["a"].tolist() == [2, 1, 1, *[0] * 13]
    assert np.flatnonzero(journal.last_flips["b"]).tolist() == [0, 1, 16, 47]
    assert journal.last_flips["b"][[0, 1, 16, 47]].tolist() == [1, 4, 4, 4]
    assert {name: flips.tolist() for name, flips in journal.flips.items()} == {
        "a": [3, 1, 0, 0, 0],
        "b": [2, 0, 0, 3, 0],
    }
    assert journal.ratios("a", "b").values == pytest.approx([5 / 64, 1 / 64, 0, 3 / 64, 0])


def test_long_journals_are_averaged_over_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_journal(tmp_path)
    monkeypatch.setattr("bitfleet.launch.report.run_journal.MAX_INTERVALS", 3)
    journal = read_journal(tmp_path)
    assert journal.interval == 2
    assert journal.ratios("a").steps == (2, 4, 5)
    assert journal.ratios("a", "b").values == pytest.approx([6 / 128, 3 / 128, 0])


def test_report_of_a_run_with_a_journal(tmp_path: Path) -> None:
    run = synthetic.run_folder(tmp_path / "run")
    assert journal_blocks(read_run(run)) == []
    write_journal(run)
    flips, ages = journal_blocks(read_run(run))
    assert flips.png
    assert ages.table is not None
    assert ages.table.rows[0] == ("all", "64", "0.141", "4", "5", "5", "89.1")
    assert [row[0] for row in ages.table.rows] == ["all", "a", "b"]
    page, _ = write_report([run])
    assert "journal" in page.read_text()
    assert (run / "report" / "run-journal-ages.png").is_file()


def test_damaged_journal_is_told_and_the_rest_is_reported(tmp_path: Path) -> None:
    run = synthetic.run_folder(tmp_path / "run")
    write_journal(run)
    (run / FOLDER / journal_format.file_name(1, 0, 1, 2)).unlink()
    (block,) = journal_blocks(dataclasses.replace(read_run(run)))
    assert "rank 1 of 2" in block.text
    assert not block.png


def test_a_part_whose_first_frame_is_damaged_is_left_out(tmp_path: Path) -> None:
    run = synthetic.run_folder(tmp_path / "run")
    damaged = []
    for rank, pieces in enumerate(PIECES):
        header = journal_format.header(LAYOUT._replace(rank=rank, pieces=pieces))
        damaged.append(header + bytes([255]) * 9)
    (run / FOLDER).mkdir()
    for number, begin in ((1, 0), (2, 5)):
        for rank, content in enumerate(damaged):
            (run / FOLDER / journal_format.file_name(number, begin, rank, 2)).write_bytes(content)
    (block,) = journal_blocks(read_run(run))
    assert block.text.startswith("The flip journal cannot be read: ")
    assert "dimension" not in block.text
    write_journal(run)
    journal = read_journal(run)
    assert (journal.first_step, journal.last_step) == (0, 5)
    assert sum(journal.flips["b"]) == 5
