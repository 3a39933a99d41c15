"""`bitfleet reproduce`: a dry run that is stopped, continued on other ranks, judged again; on tiny
images."""

import json
from pathlib import Path

import pytest

from bitfleet.launch.reproduce.command import reproduce
from bitfleet.trainer.metrics import read_metrics
from tests.conftest import BIN, Launch, run_command

pytestmark = pytest.mark.slow


def test_dry_run_continues_on_other_ranks_and_ends_with_a_card(
    deepspeed: Launch, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 steps an epoch and 3 epochs; stopped in the second one on one rank, continued by the same
    command on two."""
    options = ["birealnet18", "--dry_run", "--data.root", tiny_images, "--model.num_classes", "4", "--epochs", "3"]
    options += ["--global_batch_size", "16", "--num_replicas", "2", "--output", tmp_path]
    run = tmp_path / "reproduce" / "birealnet18-dry-run-seed-0"
    started = run_command([BIN / "bitfleet", "reproduce", *options, "--stop_after_steps", "17"])
    assert started.returncode == 0, started.stdout
    assert "reproduce: dry run of Bi-Real Net 18 on ImageNet" in started.stdout
    assert "reproduce: CHANGED epochs is 3, in the recipe 6" in started.stdout
    assert started.stdout.count(" at epoch 1/3") == 1
    assert "Step 17 of 36" in started.stdout
    reproduce(["birealnet18", "--dry_run", "--check", str(run)])  # no SystemExit
    assert "unfinished\nthe last validation is of epoch 1/3" in capsys.readouterr().out

    done = deepspeed(2, "--module", "bitfleet.launch", "reproduce", *options)
    assert done.returncode == 0, done.stdout
    assert "step-00000017: 36 steps on 2 ranks" in done.stdout
    assert [done.stdout.count(f" at epoch {epoch}/3") for epoch in (1, 2, 3)] == [0, 1, 1]  # by rank 0 alone
    assert "Bi-Real Net 18 on ImageNet: dry run\ntop-1 " in done.stdout
    card = json.loads((run / "reproduce.json").read_text())
    validation = next(line for line in reversed(read_metrics(run)) if line["kind"] == "validation")
    assert card["verdict"] == "dry run"
    assert card["top1"] == 100 * validation["top1"]
    assert (card["run"]["step"], card["run"]["steps_per_epoch"], card["run"]["world_size"]) == (36, 12, 2)
    assert [each["epochs_done"] for each in card["standings"]] == [1, 2, 3]
    assert ["epochs", 6, 3] in [list(change.values()) for change in card["changes"]]

    reproduce(["birealnet18", "--dry_run", "--check", str(run)])
    again = json.loads((run / "reproduce.json").read_text())
    assert again == card
    with pytest.raises(SystemExit) as finding:  # judged as a run of the paper
        reproduce(["birealnet18", "--check", str(run)])
    assert finding.value.code == 1
    assert "not a reproduction\ntop-1 " in capsys.readouterr().out


def test_launch_train_takes_it_too(tiny_images: Path, tmp_path: Path) -> None:
    """So slurm.sh, kubernetes.yaml and every other launcher start it; the first step is enough."""
    options = f"--reproduce xnornet --dry_run --data.root {tiny_images} --model.num_classes 4 --global_batch_size 16"
    options += f" --run_dir {tmp_path / 'run'} --stop_after_steps 1"
    done = run_command([BIN / "bitfleet", "launch", "deepspeed", "--gpus", "1", *options.split()])
    assert done.returncode == 0, done.stdout
    assert "Step 1 of 72" in done.stdout
    assert f"bitfleet reproduce xnornet --dry_run --check {tmp_path / 'run'}" in done.stdout
