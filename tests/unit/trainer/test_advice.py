"""Advice on configurations: what each line says, and when it warns."""

import dataclasses

import pytest

from bitfleet.configs import available, load_config
from bitfleet.optim import OptimConfig, constant, linear, with_rule
from bitfleet.trainer import advice
from bitfleet.trainer.advice import advise
from bitfleet.trainer.advice_gradient import Gradient, measure_gradient
from bitfleet.trainer.advice_outlook import Line, Outlook, count_images, make_outlook
from bitfleet.trainer.advice_table import format_advice
from bitfleet.trainer.config import TrainConfig

SMALL = load_config("fashion_quickstart")
GRADIENT = Gradient(1e-4, 1e-5, "last", 1e-3, "first", 8, "of nothing")


def lines_of(config: TrainConfig, num_images: int = 6000, gradient: Gradient | None = GRADIENT) -> dict[str, Line]:
    found = advise(make_outlook(config, num_images, gradient))
    assert len({line.quantity for line in found}) == len(found)
    return {line.quantity: line for line in found}


def with_optim(config: TrainConfig = SMALL, *, rule: str = "bop2ndorder", **changes: object) -> TrainConfig:
    optim = with_rule(config.optim, rule)
    return dataclasses.replace(config, optim=dataclasses.replace(optim, **changes))  # type: ignore[arg-type]


def test_nothing_is_wrong_with_the_shipped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfleet.optim.advice.NUM_STRIDES", 200)
    monkeypatch.setattr("bitfleet.optim.advice.FINE_STEPS", 100)
    for name in available():
        config = load_config(name)
        number, _ = count_images(config.data, config.model.num_classes)
        found = lines_of(config, number)
        assert {line.verdict for line in found.values()} <= {"ok", "look"}, name
        assert found["flips at step 1"].value == "50 %"
        assert "w is -sign(m)" in found["threshold against r, start"].why


def test_numbers_of_the_quickstart() -> None:
    found = lines_of(SMALL)
    assert "|r| is 0.03 for every weight (gamma / sqrt(sigma))" in found["flips at step 1"].why
    assert found["flips at step 2"].value == "25 %"
    assert found["flips at step 10"].value == "10 %"
    assert found["memory 1/gamma"].verdict == "look"  # 3,333 steps, the run has 1,104
    assert found["memory 1/gamma"].value.startswith("3,333 -> 63,812 steps")
    assert "v has settled from step 466" in found["memory 1/sigma"].why
    assert "the last step is 22 before its end, 1e-05" in found["schedule of gamma"].why  # 1,125 to 1,104


def test_step_1_under_each_threshold() -> None:
    """gamma / sqrt(sigma) is 0.03."""
    assert lines_of(with_optim(threshold=constant(0.029)))["flips at step 1"].value == "50 %"
    held = lines_of(with_optim(threshold=constant(0.031)))["flips at step 1"]
    assert (held.value, held.verdict) == ("0 %", "look")


def test_bop_needs_the_gradient() -> None:
    config = with_optim(rule="bop", threshold=constant(3e-8))
    found = lines_of(config)  # m is 3e-4 * 1e-4 = 3e-8 of one standard deviation: half of 31.7 %
    assert found["flips at step 1"].value == "16 %"
    assert not any("sigma" in quantity for quantity in found)
    unknown = lines_of(config, gradient=None)["flips at step 1"]
    assert unknown.verdict == "look"
    assert "was not measured" in unknown.why


def test_threshold_out_of_reach_is_wrong() -> None:
    found = lines_of(with_optim(threshold=constant(1.0)))
    assert found["threshold against r, middle"].verdict == "wrong"
    assert found["flips at step 552 (middle)"].verdict == "wrong"
    assert found["threshold against r, end"].verdict == "look"  # the end of a run may be meant to be still


def test_threshold_of_the_size_of_noise_matters() -> None:
    constants = with_optim(gamma=constant(1e-7), sigma=constant(1e-3), threshold=constant(1e-6))
    found = lines_of(constants)
    assert "the threshold matters" in found["threshold against r, middle"].why
    assert "for all but a few weights" in lines_of(SMALL)["threshold against r, end"].why


def test_moments_that_fp32_does_not_move() -> None:
    gone = with_optim(gamma=linear(3e-4, 1e-13, 100), sigma=linear(1e-2, 1e-12, 100))
    found = lines_of(gone)
    assert found["fp32: m at the end"].verdict == found["fp32: v at the end"].verdict == "wrong"
    late = lines_of(with_optim(gamma=linear(3e-4, 1e-13, 1000)))["fp32: m at the end"]
    assert late.verdict == "look"  # it goes on until the last tenth of the run
    assert "m stands still by then" in late.why
    assert found["schedule of gamma"].verdict == "look"
    assert "from step 100 of 1,104 on" in found["schedule of gamma"].why


def test_small_gradients() -> None:
    found = lines_of(SMALL, gradient=GRADIENT._replace(smallest_rms=1e-9))
    assert found["epsilon 1e-10"].verdict == "look"  # sqrt(v) is 0.01 * 1e-9
    assert found["fp32: v underflows"].verdict == "ok"
    assert lines_of(SMALL, gradient=GRADIENT._replace(smallest_rms=1e-18))["fp32: v underflows"].verdict == "wrong"


def test_memory_in_images_against_the_paper() -> None:
    config = load_config("xnornet_imagenet")
    number = 1_281_167
    same = dataclasses.replace(config, global_batch_size=256, epochs=1, optim=OptimConfig(gamma=constant(2.5e-5)))
    assert lines_of(same, number)["memory in images"].verdict == "ok"
    other = dataclasses.replace(same, optim=OptimConfig(gamma=constant(1e-4)))
    line = lines_of(other, number)["memory in images"]
    assert line.verdict == "look"
    assert "0.25 x the paper's on ImageNet (batch 1024, gamma 0.0001)" in line.why
    assert "the same memory is gamma 2.5e-05" in line.why


def test_schedules_and_the_run_they_belong_to() -> None:
    stairs = dataclasses.replace(SMALL.optim.lr, kind="exponential", rate=0.1, num_steps=500)
    found = lines_of(with_optim(lr=stairs, gamma=linear(1e-3, 1e-5, 2000)))
    assert "2 stairs of 500 steps x 0.1" in found["schedule of lr"].why
    assert "after 2,000 steps, but the run has 1,104" in found["schedule of gamma"].why


def test_rule_without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(advice.ADVICE, "bop")
    found = lines_of(with_optim(rule="bop"))
    assert found["rule"].verdict == "look"
    assert "no advice for this rule yet, only for bop2ndorder" in found["rule"].why
    assert "schedule of lr" in found


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_a_few_steps(steps: int) -> None:
    lines_of(dataclasses.replace(SMALL, epochs=1), num_images=128 * steps)


def test_images_of_an_unknown_data_set() -> None:
    data = dataclasses.replace(SMALL.data, root="/nowhere")
    assert count_images(data, 1000)[0] == 1_281_167
    with pytest.raises(ValueError, match="Pass --images N"):
        count_images(data, 7)
    with pytest.raises(ValueError, match="128, more than the 100 training images"):
        make_outlook(SMALL, 100)


def test_gradient_of_noise_is_taken_to_the_batch() -> None:
    tiny = dataclasses.replace(
        SMALL, global_batch_size=4, model=dataclasses.replace(SMALL.model, width=8), num_threads=1
    )
    few = measure_gradient(tiny)
    assert few is not None
    assert (few.num_images, few.images) == (4, "of fashion-mnist")
    assert 0 < few.smallest_rms < few.rms < few.largest_rms
    elsewhere = dataclasses.replace(
        tiny, global_batch_size=40_000, data=dataclasses.replace(tiny.data, root="/nowhere")
    )
    many = measure_gradient(elsewhere)
    assert many is not None
    assert "random pixels" in many.images
    assert many.num_images == 390
    # 390 images make a gradient a tenth as noisy as 4 do; what is left is taken down to 40,000 by the root of the batch.
    assert many.rms < 0.3 * few.rms


def test_table() -> None:
    outlook = Outlook(config=SMALL, num_images=6000)
    text = format_advice(outlook, "given", [Line("a", "1", "ok", "short"), Line("bb", "2", "wrong", "long " * 40)])
    assert text.startswith(
        "fashion_quickstart: bop2ndorder, 1,104 steps, 24 epochs of 46 batches of 128; 6,000 images (given)"
    )
    assert "1 ok, 0 look, 1 wrong." in text
    assert max(map(len, text.splitlines()[2:-1])) <= 110
