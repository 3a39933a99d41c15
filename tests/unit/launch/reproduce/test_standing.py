import pytest

from bitfleet.launch.reproduce.curves import expected_curve
from bitfleet.launch.reproduce.standing import sentence, stand, watcher
from bitfleet.trainer.metrics import Accuracy
from tests.unit.launch.reproduce.test_curves import CURVE


@pytest.mark.parametrize(
    ("top1", "word", "difference"),
    [
        (40.0, "on track", 0.0),
        (36.0, "on track", -4.0),
        (35.9, "off", -4.1),
        (44.0, "on track", 4.0),
        (44.1, "off", 4.1),
    ],
)
def test_words(top1: float, word: str, difference: float) -> None:
    standing = stand(CURVE, 50, 100, top1, chance=0.1)
    assert standing.word == word
    assert standing.difference == pytest.approx(difference)


def test_run_of_another_length_is_compared_at_the_same_fraction() -> None:
    assert stand(CURVE, 5, 10, 41.0, 0.1)[2:] == (40.0, 4.0, "on track")
    assert stand(CURVE, 10, 10, 41.0, 0.1)[2:] == (50.0, 2.0, "off")


def test_too_early_where_guessing_would_be_on_track() -> None:
    assert stand(CURVE, 2, 100, 3.0, chance=2.0).word == "too early"
    assert stand(CURVE, 2, 100, 3.0, chance=1.0).word == "on track"
    assert stand(CURVE, 2, 100, 30.0, chance=2.0).word == "off"  # far above is off at any time
    assert stand(CURVE, 1, 100, 3.0, chance=1.0)[2:] == (None, None, "too early")


@pytest.mark.parametrize(("name", "epochs"), [("birealnet18", 150), ("xnornet", 100)])
def test_network_that_only_guesses_is_off_at_epoch_8(name: str, epochs: int) -> None:
    """1 / gamma is 10,000 steps, 8 epochs; before that a slow start is not held against a run."""
    curve = expected_curve(name)
    assert stand(curve, 8, epochs, 0.1, chance=0.1).word == "off"
    assert stand(curve, 1, epochs, 0.1, chance=0.1).word == "too early"


def test_sentences() -> None:
    def said(epochs_done: float, top1: float) -> str:
        return sentence(stand(CURVE, epochs_done, 10, top1, 0.1), CURVE, 10)

    assert said(5, 41.0) == (
        "reproduce: on track at epoch 5/10: top-1 41.00 %, expected 40.00 +- 4.0 (c at 50 % of its run)"
    )
    assert said(5, 12.5).startswith("reproduce: off by -27.5 points at epoch 5/10: top-1 12.50 %, expected 40.00")
    assert said(0.1, 1.0) == "reproduce: too early to tell at epoch 0.1/10: before the first point of c"
    nothing = sentence(stand(None, 3, 500, 60.0, 10.0), None, 500)
    assert nothing == "reproduce: top-1 60.00 % at epoch 3/500; no curve is known that it could be held against"


def test_watcher_counts_epochs_in_steps_and_percent() -> None:
    say = watcher(CURVE, epochs=10, steps_per_epoch=7, num_classes=10)
    assert "on track at epoch 5/10: top-1 41.00 %" in say(35, Accuracy(1.0, 0.41, 0.9, 100))
