"""Choose the folder that a run writes into, and the checkpoint that it resumes from."""

import os
from pathlib import Path

import pytest

from bitfleet.trainer.checkpoint.format import checkpoints, latest_checkpoint, set_aside
from bitfleet.trainer.checkpoint.run_folder import (
    RunFolder,
    checkpoint_disk,
    choose_run_folder,
    create_and_lock,
    planned_folder,
)

NAME = "fashion_quickstart"


def choose(output: Path, run_dir: Path | None = None, resume: str | None = None) -> RunFolder:
    return choose_run_folder(output / NAME, run_dir, resume)


def make_run(path: Path, *steps: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    for step in steps:
        folder = path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")
    return path


def test_new_runs_never_share_a_folder(tmp_path: Path) -> None:
    first = choose(tmp_path)
    assert first.checkpoint is None
    assert first.path.parent == tmp_path / "fashion_quickstart"
    make_run(first.path)
    assert choose(tmp_path).path != first.path


def test_new_run_comes_last_when_the_clock_was_set_back(tmp_path: Path) -> None:
    runs = tmp_path / "fashion_quickstart"
    make_run(runs / "2999-01-01_00-00-00")
    later = [make_run(choose(tmp_path).path) for _ in range(2)]
    assert [path.name for path in later] == ["2999-01-01_00-00-00__002", "2999-01-01_00-00-00__003"]
    (later[1] / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert choose(tmp_path, resume="auto").path == later[1]


def test_names_that_are_no_dates_do_not_decide_what_is_new(tmp_path: Path) -> None:
    runs = tmp_path / NAME
    named = make_run(runs / "baseline")
    os.utime(named / "config.json", (1e9, 1e9))
    (runs / "notes.txt").touch()
    dated = make_run(choose(tmp_path).path)
    assert "__" not in dated.name
    assert choose(tmp_path, resume="auto").path == dated
    os.utime(named / "config.json", (4e9, 4e9))
    assert choose(tmp_path, resume="auto").path == named


def test_auto_continues_the_newest_run(tmp_path: Path) -> None:
    assert choose(tmp_path, resume="auto").checkpoint is None
    runs = tmp_path / "fashion_quickstart"
    make_run(runs / "2026-01-01_00-00-00", 5)
    newest = make_run(runs / "2026-01-02_00-00-00", 99, 100)
    (runs / "2026-01-03_00-00-00").mkdir()  # killed before it wrote anything
    assert choose(tmp_path, resume="auto") == RunFolder(newest, newest / "checkpoints" / "step-00000100")
    unsaved = make_run(runs / "2026-01-04_00-00-00")  # killed before its first checkpoint
    assert choose(tmp_path, resume="auto") == RunFolder(unsaved, None)


def test_a_given_folder_is_resumed_or_started(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert choose(tmp_path, run, "auto") == RunFolder(run, None)
    make_run(run, 7)
    assert choose(tmp_path, run, "auto") == RunFolder(run, run / "checkpoints" / "step-00000007")


@pytest.mark.parametrize("is_named", [True, False])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(is_named: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path / NAME / "2026-01-01_00-00-00", 5)
    set_aside(run / "checkpoints" / "step-00000005")
    with pytest.raises(ValueError, match=rf"{run} has no intact .*only damaged-step-00000005.*--run_dir.*move"):
        choose(tmp_path, run if is_named else None, "auto")


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"already holds a run.*--resume auto"):
        choose(tmp_path, tmp_path / "run")


def test_resume_by_path_of_run_or_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3, 6)
    newest, older = run / "checkpoints" / "step-00000006", run / "checkpoints" / "step-00000003"
    assert choose(tmp_path, resume=str(run)) == RunFolder(run, newest)
    assert choose(tmp_path, resume=str(newest)) == RunFolder(run, newest)
    with pytest.raises(ValueError, match=r"step-00000003 is not the newest.*--run_dir"):
        choose(tmp_path, resume=str(older))


def test_checkpoints_may_be_on_another_disk(tmp_path: Path) -> None:
    run, disk = make_run(tmp_path / "run", 3), tmp_path / "disk"
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    newest = run / "checkpoints" / "step-00000003"
    assert choose(tmp_path, resume=str(newest)) == RunFolder(run, newest)
    assert planned_folder(tmp_path, None, str(newest)) == run
    with pytest.raises(ValueError, match=r"disk/step-00000003 is not in the folder checkpoints of a run.* --run_dir"):
        choose(tmp_path, resume=str(disk / "step-00000003"))


def test_folder_that_was_used_meanwhile_is_not_taken(tmp_path: Path) -> None:
    chosen = choose(tmp_path, run_dir=tmp_path / "run", resume="auto")
    create_and_lock(chosen).close()
    make_run(tmp_path / "run", 3)
    with pytest.raises(ValueError, match="another run has used .*run"):
        create_and_lock(chosen)
    create_and_lock(choose(tmp_path, run_dir=tmp_path / "run", resume="auto")).close()


def test_branching_goes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3, 6)
    older = run / "checkpoints" / "step-00000003"
    branch = tmp_path / "branch"
    assert choose(tmp_path, branch, str(older)) == RunFolder(branch, older, branches=True)
    make_run(branch)
    with pytest.raises(ValueError, match="branch already holds a run"):
        choose(tmp_path, branch, str(older))
    assert choose(tmp_path, resume=str(run), run_dir=run).path == run


def test_resume_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        choose(tmp_path, resume=str(tmp_path))
    make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        choose(tmp_path, resume=str(tmp_path / "run"))


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 100, 99, 1000)
    (run / "checkpoints" / ".tmp-00002000").mkdir()
    (run / "checkpoints" / "damaged-step-00003000").mkdir()
    assert [path.name for path in checkpoints(run)] == ["step-00000099", "step-00000100", "step-00001000"]
    assert latest_checkpoint(tmp_path) is None


def test_the_disk_is_that_of_the_checkpoints(tmp_path: Path) -> None:
    """Their folder may be a link to another disk; what is not there yet will be on the disk of what
    is above it."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert checkpoint_disk(run) == tmp_path
    run.mkdir()
    assert checkpoint_disk(run) == run
    elsewhere.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    assert checkpoint_disk(run).samefile(elsewhere)


@pytest.mark.parametrize(
    ("run_dir", "resume", "expected"),
    [
        (None, None, "out/NAME"),
        (Path("own"), None, "own"),
        (None, "auto", "out/NAME"),
        (None, "/other/run", "/other/run"),
        (Path("branch"), "/other/run", "branch"),
    ],
)
def test_where_a_run_will_write(run_dir: Path | None, resume: str | None, expected: str) -> None:
    assert planned_folder(Path("out/NAME"), run_dir, resume) == Path(expected)
