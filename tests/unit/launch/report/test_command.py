"""The command line of `bitfleet report`."""

from pathlib import Path

import pytest

from bitfleet.launch.report.command import report
from tests.unit.launch.report import synthetic


def test_the_command_says_the_answer_and_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([str(synthetic.run_folder(tmp_path / "run", 2)), "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert "training is at step 20" in lines[0]


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="--format"):
        report(["runs", "--format", "pdf"])
    with pytest.raises(ValueError, match="sweep folders"):
        report([])
