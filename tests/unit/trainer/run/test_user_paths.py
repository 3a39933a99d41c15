"""The home folder in paths, wherever they are given."""

import dataclasses
import json
from pathlib import Path

import pytest

from bitfleet.configs import load_config
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.trainer.engine.config import deepspeed_options
from bitfleet.trainer.run.user_paths import users_path, with_users_paths
from tests.conftest import run_bitfleet


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_path_of_a_run(home: Path) -> None:
    options = "--run_dir=~/a --output ~/b --init ~/c.h5 --resume ~/d --data.root ~/e --engine.deepspeed ~/f.json"
    config = parse_train(["--config", "fashion_quickstart", *options.split()], "t")
    found = (config.run_dir, config.output, config.init, config.resume, config.data.root, config.engine.deepspeed)
    assert [str(path) for path in found] == [str(home / name) for name in ("a", "b", "c.h5", "d", "e", "f.json")]


def test_paths_of_a_configuration_file(home: Path) -> None:
    base = load_config("fashion_quickstart")
    config = dataclasses.replace(base, output=Path("~/runs"), data=dataclasses.replace(base.data, root="~"))
    expanded = with_users_paths(config)
    assert (expanded.output, expanded.data.root) == (home / "runs", str(home))
    assert with_users_paths(base) is base  # "embedded:..." and "runs" are not such paths


def test_paths_in_deepspeeds_options(home: Path) -> None:
    (home / "ds.json").write_text(json.dumps({"csv_monitor": {"enabled": True, "output_path": "~/csv"}}))
    engine = parse_train("--config fashion_quickstart --engine.deepspeed ~/ds.json".split(), "t").engine
    options = deepspeed_options(engine, global_batch_size=8, num_replicas=1, world_size=1)
    assert options["csv_monitor"]["output_path"] == str(home / "csv")


def test_a_tilde_elsewhere_is_a_tilde(home: Path) -> None:
    assert users_path("/~/x") == Path("/~/x")
    assert users_path("a~b/~") == Path("a~b/~")


def test_the_home_of_nobody_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="~nobody_of_that_name/x"):
        parse_train("--config fashion_quickstart --run_dir ~nobody_of_that_name/x".split(), "t")


COMMANDS = {
    "checkpoint inspect ~/gone": "gone",
    "journal info ~/gone": "gone",
    "report ~/gone": "gone",
    "data verify ~/gone": "gone",
    "plan --rates ~/gone --config fashion_quickstart": "gone",
    "launch deepspeed --hostfile ~/gone --config fashion_quickstart": "gone",
    "reproduce binarynet --check ~/gone": "gone",
    "advise ~/gone": "gone",
    "bench gpu --cifar ~/gone": "gone",
}
"""Commands that refuse a path which is not there, and name it."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_path_below_home(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitfleet.launch.cli import dispatch

    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.argv", ["bitfleet", *command.split()])
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (any: the path is what counts)
        dispatch()
    assert str(home / COMMANDS[command]) in str(raised.value)
    assert not (home / "~").exists()


def test_evaluation_finds_a_run_below_home(home: Path) -> None:
    """Runs in another process, since it makes a process group."""
    done = run_bitfleet("evaluate", "~/gone")
    assert str(home / "gone") in done.stdout.splitlines()[-1]
