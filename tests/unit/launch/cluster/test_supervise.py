from pathlib import Path

import pytest

from bitfleet.launch.cluster import supervise
from bitfleet.launch.cluster.supervise import ask_by_file, job_code


@pytest.mark.parametrize(
    ("launcher", "left_behind", "code"),
    [
        (0, [], 0),
        (75, [], 75),
        (2, [], 2),
        (-9, [], 137),  # and nobody left: who knows what became of the ranks
        (0, [75, 75], 75),  # DeepSpeed's command said 0, but its agent was killed
        (0, [75, 1], 1),
        (0, [-9, 75], 137),
        (-15, [75], 75),  # the agent outlived the command
        (-9, [0], 0),
        (3, [75], 3),
    ],
)
def test_exit_code_of_a_job(launcher: int, left_behind: list[int], code: int) -> None:
    assert job_code(launcher, left_behind) == code


def test_exit_code_of_a_job_that_was_killed_on_request() -> None:
    assert job_code(-9, [-9], interrupted=True) == 130


def test_stop_file_is_written_again_and_never_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, written = tmp_path / "run" / "STOP", list[float]()
    ask_by_file(stop, written)
    assert not written
    stop.parent.mkdir()
    ask_by_file(stop, written)
    assert stop.exists()
    stop.unlink()
    ask_by_file(stop, written)
    assert not stop.exists()  # at once would be a flood
    monkeypatch.setattr(supervise, "FILE_SECONDS", 0.0)
    ask_by_file(stop, written)
    assert stop.exists()
