from pathlib import Path

import pytest

from bitfleet.configs import load_config
from bitfleet.launch.cluster.command import read_request
from bitfleet.launch.reproduce.command import parse_reproduce, reproduce
from bitfleet.launch.reproduce.recipe import changes_of_config


def test_name_and_overrides() -> None:
    arguments = "xnornet --data.root /data/imagenet --epochs 3 --seed 2".split()
    paper, recipe, config = parse_reproduce(arguments, "t")
    assert paper.title == "XNOR-Net on ImageNet"
    assert recipe == load_config("xnornet_imagenet")
    assert (config.name, config.resume, config.run_dir, config.data.root) == ("xnornet", "auto", None, "/data/imagenet")
    assert [change.name for change in changes_of_config(recipe, config)] == ["epochs"]


def test_dry_run_is_of_the_embedded_images() -> None:
    paper, recipe, config = parse_reproduce(["xnornet", "--dry-run"], "t")
    assert paper.is_dry
    assert (config.name, config.data.root) == ("xnornet-dry-run", "fashion-mnist")
    assert changes_of_config(recipe, config) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("birealnet", "not 'birealnet'; did you mean 'birealnet18'"),
        ("birealnet18 --epoch 3", "no option --epoch; did you mean --epochs"),
        ("--check /nowhere", "which run of the paper.* one of: birealnet18, xnornet, binarynet"),
        ("--dry_run birealnet18", "Its name comes first"),
        ("birealnet18 --check /nowhere", "/nowhere is not a run folder"),
        ("birealnet18 --check /nowhere --epochs 3", "judges a run as it is: leave out --epochs 3"),
    ],
)
def test_bad_input_is_one_sentence(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reproduce(arguments.split())


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    reproduce([])
    reproduce(["--help"])
    assert capsys.readouterr().out.count("usage: bitfleet reproduce birealnet18|xnornet|binarynet") == 2
    with pytest.raises(SystemExit, match="0"):
        reproduce(["xnornet", "--help"])
    assert "--optim.rule" in capsys.readouterr().out


def test_every_launcher_starts_it(tmp_path: Path) -> None:
    given = ["--gpus", "2", "--reproduce", "birealnet18", "--dry_run", "--run_dir", str(tmp_path)]
    request, config = read_request(given, "torchrun")
    assert request.arguments == tuple(given[2:])
    assert (config.name, config.run_dir) == ("birealnet18-dry-run", tmp_path)
    with pytest.raises(ValueError, match="no option --epoch"):
        read_request([*given, "--epoch", "3"], "torchrun")
