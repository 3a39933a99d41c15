import shlex
from pathlib import Path

import pytest

from bitfleet.launch.train import next_commands, train


@pytest.mark.parametrize(("num_ranks", "start"), [(1, "train"), (2, "launch deepspeed --gpus 2")])
def test_next_commands_keep_the_overrides_and_replace_the_place(num_ranks: int, start: str) -> None:
    arguments = shlex.split("--config x --run_dir 'a b' --resume=auto --epochs 3 --stop_after_steps 7")
    lines = next_commands(Path("a b"), arguments, num_ranks).splitlines()
    assert lines[-1].endswith(f"bitfleet {start} --config x --epochs 3 --resume 'a b'")
    assert lines[-2].endswith("bitfleet evaluate 'a b'")
    assert "tensorboard --logdir 'a b'/tensorboard" in lines[-3]


def test_help_of_a_reproduction_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        train("--reproduce birealnet18 --dry_run --help".split())
    assert not leaving.value.code
    assert "bitfleet reproduce birealnet18" in capsys.readouterr().out
