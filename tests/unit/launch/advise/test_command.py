"""The command `bitfleet advise`: its words, and that a verdict is not a failure."""

import pytest

from bitfleet.launch.advise.command import advise
from bitfleet.trainer.config import TrainConfig


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, int | None]]:
    """Collect the calls of the command."""
    calls: list[tuple[TrainConfig, int | None]] = []

    def advise_config(config: TrainConfig, num_images: int | None) -> str:
        calls.append((config, num_images))
        return "the table"

    monkeypatch.setattr("bitfleet.launch.advise.advice.advise_config", advise_config)
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
        ("fashion_quickstar", "'fashion_quickstart'"),
        ("runs/gone", "runs/gone"),
        ("fashion_quickstart --optim.gama.start 1", "--optim.gamma.start"),
        ("fashion_quickstart --images many", "--images.* 'many'"),
        ("/ --epochs 3", "/ is a run.* --epochs"),
        ("/", "/ is not a run"),
    ],
)
def test_bad_words_are_one_sentence(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advise(words.split())


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_explains_the_exit_code(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        advise(arguments)
    assert "exit code is 0" in " ".join(capsys.readouterr().out.split())
