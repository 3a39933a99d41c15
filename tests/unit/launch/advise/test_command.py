"""The command `bitfleet advise`: what its words mean, and that a verdict is no failure."""

import pytest

from bitfleet.launch.advise.command import advise
from bitfleet.trainer.config import TrainConfig


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, int | None]]:
    """What the command would compute."""
    calls: list[tuple[TrainConfig, int | None]] = []

    def advise_config(config: TrainConfig, num_images: int | None) -> str:
        calls.append((config, num_images))
        return "the table"

    monkeypatch.setattr("bitfleet.launch.advise.run.advise_config", advise_config)
    return calls


@pytest.mark.parametrize(
    "words", ["fashion_quickstart", "--config fashion_quickstart", "--config=fashion_quickstart --images 60000"]
)
def test_configuration_by_name_or_option(
    words: str, asked: list[tuple[TrainConfig, int | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    advise([*words.split(), "--optim.gamma.start", "1e-7"])
    ((config, num_images),) = asked
    assert config.optim.gamma.start == 1e-7
    assert num_images == (60_000 if "images" in words else None)
    assert capsys.readouterr().out == "the table\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fashion_quickstar", "did you mean 'fashion_quickstart'"),
        ("runs/gone", "there is no run folder runs/gone"),
        ("fashion_quickstart --optim.gama.start 1", "did you mean --optim.gamma.start"),
        ("fashion_quickstart --images many", "--images must be a positive number, not 'many'"),
        ("/ --epochs 3", "/ is a run, which has its configuration: leave out --epochs"),
        ("/", "is not a run folder"),
    ],
)
def test_bad_words_are_one_sentence(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advise(words.split())


def test_help_explains_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    advise(["--help"])
    assert "The exit code is 0 whatever the\nverdicts are" in capsys.readouterr().out
