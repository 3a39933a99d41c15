import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bitfleet.configs import load_config
from bitfleet.trainer.checkpoint.format import checkpoints, latest_checkpoint
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.run.folder import (
    RunFolder,
    checkpoint_disk,
    choose_run_folder,
    planned_folder,
    read_config,
    take_folder,
    write_config,
)


def make(output: Path, **fields: object) -> TrainConfig:
    return dataclasses.replace(load_config("fashion_quickstart"), output=output, **fields)  # type: ignore[arg-type]


def make_run(path: Path, config: TrainConfig, *steps: int) -> Path:
    write_config(path, config, {"world_size": 2})
    for step in steps:
        folder = path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")
    return path


def test_new_runs_never_share_a_folder(tmp_path: Path) -> None:
    config = make(tmp_path)
    first = choose_run_folder(config)
    assert first.checkpoint is None
    assert first.path.parent == tmp_path / "fashion_quickstart"
    make_run(first.path, config)
    assert choose_run_folder(config).path != first.path


def test_new_run_comes_last_when_the_clock_was_set_back(tmp_path: Path) -> None:
    config = make(tmp_path, resume="auto")
    runs = tmp_path / "fashion_quickstart"
    make_run(runs / "2999-01-01_00-00-00", config)
    later = [make_run(choose_run_folder(config).path, config) for _ in range(2)]
    assert [path.name for path in later] == ["2999-01-01_00-00-00__002", "2999-01-01_00-00-00__003"]
    (later[1] / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert choose_run_folder(config).path == later[1]


def test_auto_continues_the_newest_run_that_has_a_checkpoint(tmp_path: Path) -> None:
    config = make(tmp_path, resume="auto")
    assert choose_run_folder(config).checkpoint is None
    runs = tmp_path / "fashion_quickstart"
    make_run(runs / "2026-01-01_00-00-00", config, 5)
    newest = make_run(runs / "2026-01-02_00-00-00", config, 99, 100)
    make_run(runs / "2026-01-03_00-00-00", config)  # stopped before its first checkpoint
    assert choose_run_folder(config) == RunFolder(newest, newest / "checkpoints" / "step-00000100")


def test_a_given_folder_is_continued_or_begun(tmp_path: Path) -> None:
    config = make(tmp_path, run_dir=tmp_path / "run", resume="auto")
    assert choose_run_folder(config) == RunFolder(tmp_path / "run", None)
    make_run(tmp_path / "run", config, 7)
    assert choose_run_folder(config) == RunFolder(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000007")


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    config = make(tmp_path, run_dir=tmp_path / "run")
    make_run(tmp_path / "run", config)
    with pytest.raises(ValueError, match="--resume auto"):
        choose_run_folder(config)


def test_resume_by_path_of_run_or_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make(tmp_path), 3, 6)
    newest, older = run / "checkpoints" / "step-00000006", run / "checkpoints" / "step-00000003"
    assert choose_run_folder(make(tmp_path, resume=str(run))) == RunFolder(run, newest)
    assert choose_run_folder(make(tmp_path, resume=str(newest))) == RunFolder(run, newest)
    with pytest.raises(ValueError, match="step-00000003 .*--run_dir"):
        choose_run_folder(make(tmp_path, resume=str(older)))


def test_folder_that_was_used_meanwhile_is_not_taken(tmp_path: Path) -> None:
    chosen = choose_run_folder(make(tmp_path, run_dir=tmp_path / "run", resume="auto"))
    take_folder(chosen).close()
    make_run(tmp_path / "run", make(tmp_path), 3)
    with pytest.raises(ValueError, match="another run .*run "):
        take_folder(chosen)
    take_folder(choose_run_folder(make(tmp_path, run_dir=tmp_path / "run", resume="auto"))).close()


def test_branching_goes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make(tmp_path), 3, 6)
    older = run / "checkpoints" / "step-00000003"
    branch = make(tmp_path, resume=str(older), run_dir=tmp_path / "branch")
    assert choose_run_folder(branch) == RunFolder(tmp_path / "branch", older, branches=True)
    make_run(tmp_path / "branch", branch)
    with pytest.raises(ValueError, match="branch "):
        choose_run_folder(branch)
    assert choose_run_folder(make(tmp_path, resume=str(run), run_dir=run)).path == run


def test_resume_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume"):
        choose_run_folder(make(tmp_path, resume=str(tmp_path)))
    make_run(tmp_path / "run", make(tmp_path))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        choose_run_folder(make(tmp_path, resume=str(tmp_path / "run")))


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make(tmp_path), 100, 99, 1000)
    (run / "checkpoints" / ".tmp-00002000").mkdir()
    (run / "checkpoints" / "damaged-step-00003000").mkdir()
    assert [path.name for path in checkpoints(run)] == ["step-00000099", "step-00000100", "step-00001000"]
    assert latest_checkpoint(tmp_path) is None


def test_config_file_states_revision_and_versions(tmp_path: Path) -> None:
    config = make(tmp_path, seed=7)
    make_run(tmp_path / "run", config)
    assert read_config(tmp_path / "run") == config
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["world_size"] == 2
    assert {"python", "torch", "deepspeed"} <= content["versions"].keys()
    assert "git" in content


@pytest.mark.parametrize("text", ["{bad", "[]", "{}"])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json .*damaged"):
        read_config(tmp_path)


def test_the_disk_is_that_of_the_checkpoints(tmp_path: Path) -> None:
    """Their folder may be a link to another disk; what is not there yet will be on the disk of what is above it."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert checkpoint_disk(run) == tmp_path
    run.mkdir()
    assert checkpoint_disk(run) == run
    elsewhere.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    assert checkpoint_disk(run).samefile(elsewhere)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "out/NAME"),
        ({"run_dir": Path("own")}, "own"),
        ({"resume": "auto"}, "out/NAME"),
        ({"resume": "/other/run"}, "/other/run"),
        ({"resume": "/other/run", "run_dir": Path("branch")}, "branch"),
    ],
)
def test_where_a_run_will_write(options: dict[str, Any], expected: str) -> None:
    config = dataclasses.replace(load_config("fashion_quickstart"), output=Path("out"), **options)
    assert planned_folder(config) == Path(expected.replace("NAME", config.name))
