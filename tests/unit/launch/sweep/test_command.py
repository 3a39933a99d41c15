from pathlib import Path

import pytest

from bitfleet.configs.sweeps import available_sweeps, load_sweep
from bitfleet.launch.cluster.hosts import Host
from bitfleet.launch.cluster.launchers import Request, deepspeed_words
from bitfleet.launch.sweep.command import read_seeds, sweep


def test_without_a_name_the_sweeps_are_listed_with_their_questions(capsys: pytest.CaptureFixture[str]) -> None:
    sweep([])
    shown = capsys.readouterr().out
    for name in available_sweeps():
        assert name in shown
        assert load_sweep(name).question in shown


@pytest.mark.parametrize(
    ("options", "start"),
    [([], "bitfleet train --config"), (["--ranks", "2"], "bitfleet launch deepspeed --gpus 2 --config")],
)
def test_print_shows_every_command_and_writes_nothing(
    options: list[str], start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--print", "--seeds", "3,4", "--config", "fashion_quickstart", "--epochs", "2", "--output", str(tmp_path)]
    sweep(["regime", *given, "--device", "cpu", *options])
    shown = capsys.readouterr().out
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  bitfleet")]
    assert len(commands) == 10
    assert all(command.startswith(f"{start} fashion_quickstart --epochs 2 --device cpu") for command in commands)
    assert (
        sum(f"--run_dir {tmp_path}/regime/runs/variant-frozen-v-seed4 --resume auto" in each for each in commands) == 1
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds 0 regime", "before --seeds"),
        ("regime s52_optimizers", "'regime' or 's52_optimizers'"),
        ("regime --seeds 1,x", "--seeds .*'1,x'"),
        ("regime --at_once 0", "--at_once.*'0'"),
        ("regime --epoch 3", "--epoch; .*--epochs"),
        ("regime --optim.rule bop --device cpu", "--optim.rule"),
    ],
)
def test_bad_input_is_one_sentence(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(words.split())


def test_seeds() -> None:
    assert read_seeds("0,1, 12") == (0, 1, 12)


def test_deepspeed_keeps_to_the_devices_of_a_place() -> None:
    """It ignores CUDA_VISIBLE_DEVICES when it is given a number of ranks."""
    request = Request((Host("", 2),), ("--config", "x"))
    assert "--num_accelerators" in deepspeed_words(request)
    visible = Request((Host("", 2),), ("--config", "x"), visible_devices=True)
    assert not {"--num_accelerators", "--num_gpus", "--include"} & set(deepspeed_words(visible))
