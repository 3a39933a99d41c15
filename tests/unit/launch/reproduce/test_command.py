from pathlib import Path

import pytest

from bitfleet.configs import load_config
from bitfleet.launch.cluster.command import read_request
from bitfleet.launch.reproduce.command import parse_reproduce, reproduce
from bitfleet.launch.reproduce.recipe import announcement, changes_of_config


def test_name_and_overrides() -> None:
    arguments = "xnornet --data.root /data/imagenet --epochs 3 --seed 2".split()
    options, paper, recipe, config = parse_reproduce(arguments)
    assert (options.check, options.dry_run) == (None, False)
    assert paper.title == "XNOR-Net on ImageNet"
    assert recipe == load_config("xnornet_imagenet")
    assert (config.name, config.resume, config.run_dir, config.data.root) == ("xnornet", "auto", None, "/data/imagenet")
    assert [change.name for change in changes_of_config(recipe, config)] == ["epochs"]


def test_dry_run_is_of_the_embedded_images() -> None:
    options, paper, recipe, config = parse_reproduce(["xnornet", "--dry-run"])
    assert options.dry_run
    assert paper.dry_run
    assert (config.name, config.data.root) == ("xnornet-dry-run", "fashion-mnist")
    assert changes_of_config(recipe, config) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("birealnet", "'birealnet'.*'birealnet18'"),
        ("birealnet18 --epoch 3", "--epoch;.*--epochs"),
        ("--check /nowhere", "birealnet18, xnornet, binarynet"),
        ("--dry_run birealnet18", "birealnet18, xnornet, binarynet"),
        ("birealnet18 --check /nowhere", "/nowhere is not a run"),
        ("birealnet18 --check /nowhere --epochs 3", "--check .* --epochs 3"),
    ],
)
def test_bad_input_is_one_sentence(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reproduce(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "option"), [("", "--check"), ("--help", "--dry_run"), ("xnornet --help", "--optim.rule")]
)
def test_help(arguments: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        reproduce(arguments.split())
    assert option in capsys.readouterr().out


def test_announcement_names_changes_before_the_first_step() -> None:
    _, paper, recipe, config = parse_reproduce(["binarynet", "--epochs", "3"])
    text = announcement(paper, recipe, config)
    assert "CHANGED epochs is 3, in the recipe 500" in text
    assert '"not a reproduction"' in text
    _, paper, recipe, config = parse_reproduce(["binarynet", "--dry_run", "--epochs", "3"])
    assert "not a reproduction" not in announcement(paper, recipe, config)


def test_every_launcher_starts_it(tmp_path: Path) -> None:
    given = ["--gpus", "2", "--reproduce", "birealnet18", "--dry_run", "--run_dir", str(tmp_path)]
    request, config = read_request(given, "torchrun")
    assert request.arguments == tuple(given[2:])
    assert (config.name, config.run_dir) == ("birealnet18-dry-run", tmp_path)
    with pytest.raises(ValueError, match="--epoch;"):
        read_request([*given, "--epoch", "3"], "torchrun")
