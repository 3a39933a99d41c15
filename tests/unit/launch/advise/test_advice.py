"""Advice on configurations: what each line says, and when it warns."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitfleet.configs import available, load_config
from bitfleet.launch.advise.advice import advise
from bitfleet.launch.advise.flips import batch_line
from bitfleet.launch.advise.gradient import Gradient, measure_gradient
from bitfleet.launch.advise.outlook import Line, Outlook, count_images, make_outlook
from bitfleet.launch.advise.table import format_advice
from bitfleet.optim import OptimConfig, Schedule, constant, linear, with_rule
from bitfleet.optim.transitions import TransitionConfig
from bitfleet.trainer.config import TrainConfig

SMALL = load_config("fashion_quickstart")
GRADIENT = Gradient(1e-4, 1e-5, "last", 1e-3, "first", 8, "of nothing")


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Coarser simulations: tests/unit/launch/advise/test_theory.py says how exact they are, here it is about the lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitfleet.launch.advise.theory.NUM_STRIDES", 50)
        patch.setattr("bitfleet.launch.advise.theory.FINE_STEPS", 20)
        yield


@functools.cache
def lines_of(config: TrainConfig, num_images: int = 6000, gradient: Gradient | None = GRADIENT) -> dict[str, Line]:
    found = advise(make_outlook(config, num_images, gradient))
    assert len({line.quantity for line in found}) == len(found)
    return {line.quantity: line for line in found}


def with_optim(config: TrainConfig = SMALL, *, rule: str = "bop2ndorder", **changes: object) -> TrainConfig:
    optim = with_rule(config.optim, rule)
    return dataclasses.replace(config, optim=dataclasses.replace(optim, **changes))  # type: ignore[arg-type]


def test_an_end_without_a_kind_is_named() -> None:
    for end, verdict in ((0.0, "ok"), (1e-4, "look")):
        line = lines_of(with_optim(lr=Schedule(start=1e-3, end=end)))["schedule of lr"]
        assert line.verdict == verdict
    assert line.why == "constant: its end, 0.0001, is used by other kinds only"


def test_nothing_is_wrong_with_the_shipped_ones() -> None:
    for name in available():
        config = load_config(name)
        is_embedded = config.data.root == "fashion-mnist"  # unpacking its 6,000 images would be most of the time
        number = 6000 if is_embedded else count_images(config.data, config.model.num_classes)[0]
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


def test_a_run_from_weights_flips_little_at_first_if_its_state_is_seeded() -> None:
    config = dataclasses.replace(SMALL, init=Path("w.safetensors"))
    found = lines_of(config)
    assert found["flips at step 1"].value == "under 1 %"
    assert "flips at step 2" not in found
    lost = lines_of(dataclasses.replace(config, optim=dataclasses.replace(config.optim, init_inertia=0.0)))
    assert lost["flips at step 1"].verdict == "wrong"
    assert "what w.safetensors has learned is lost" in lost["flips at step 1"].why


def test_step_1_under_each_threshold() -> None:
    """gamma / sqrt(sigma) is 0.03."""
    assert lines_of(with_optim(threshold=constant(0.029)))["flips at step 1"].value == "50 %"
    held = lines_of(with_optim(threshold=constant(0.031)))["flips at step 1"]
    assert (held.value, held.verdict) == ("0 %", "look")


def test_a_gamma_that_begins_at_0() -> None:
    found = lines_of(with_optim(gamma=linear(0.0, 1e-3)))
    assert found["flips at step 1"].value == "0 %"
    assert (found["memory in images"].value, found["memory in images"].verdict) == ("endless", "look")


@pytest.mark.parametrize("rule", ["bop", "bop2ndorder"])
@pytest.mark.parametrize("threshold", [0.0, 1e-9])
def test_a_gamma_that_is_0_for_a_time(rule: str, threshold: float) -> None:
    """At its beginning, and after a schedule that ends within the run."""
    late = Schedule(start=0.0, end=1e-3, kind="polynomial", delay_steps=600)
    found = lines_of(with_optim(rule=rule, gamma=late, threshold=constant(threshold)))
    assert found["flips at step 552 (middle)"].verdict == "wrong"
    assert found["fp32: m at the end"].verdict == "wrong"  # in the middle it stands still
    found = lines_of(with_optim(rule=rule, gamma=linear(1e-3, 0.0, 800), threshold=constant(threshold)))
    assert found["flips at step 1,104 (end)"].value == "0 %"
    assert "gamma is 0 there: m and the weights stand still" in found["threshold against r, end"].why


def test_a_sigma_that_begins_at_0() -> None:
    found = lines_of(with_optim(sigma=linear(0.0, 1e-2)))
    assert (found["epsilon 1e-10"].value, found["epsilon 1e-10"].verdict) == ("any g", "look")
    assert found["memory 1/sigma"].value.startswith("endless -> ")
    late = Schedule(start=0.0, end=1e-2, kind="polynomial", delay_steps=600)
    assert lines_of(with_optim(sigma=late))["fp32: v at the end"].verdict == "wrong"


def test_adams_correction_is_exact_for_a_constant_only() -> None:
    held = lines_of(with_optim(sigma=constant(1e-2), correction="adam"))["memory 1/sigma"]
    assert held.why.endswith("the correction makes up for it")
    rising = lines_of(with_optim(sigma=linear(1e-4, 1e-2), correction="adam"))["memory 1/sigma"]
    assert rising.why.endswith("the correction makes up for it in part, as sigma changes")


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
    same = dataclasses.replace(config, global_batch_size=256, epochs=1, optim=OptimConfig(gamma=constant(2.5e-5)))
    assert batch_line(make_outlook(same, 1_281_167)).verdict == "ok"
    other = dataclasses.replace(same, optim=OptimConfig(gamma=constant(1e-4)))
    line = batch_line(make_outlook(other, 1_281_167))
    assert line.verdict == "look"
    assert "0.25 x the paper's on ImageNet (batch 1024, gamma 0.0001)" in line.why
    assert "the same memory is gamma 2.5e-05" in line.why


def test_flips_that_end_are_not_ok() -> None:
    """The quickstart's threshold grows a thousandfold, which r without a second moment never follows."""
    found = lines_of(with_optim(rule="bop"))
    for step, verdict in (("552 (middle)", "wrong"), ("1,000", "look"), ("1,104 (end)", "look")):
        line = found[f"flips at step {step}"]
        assert (line.value, line.verdict) == ("0 %", verdict)


def test_schedules_and_the_run_they_belong_to() -> None:
    stairs = dataclasses.replace(SMALL.optim.lr, kind="exponential", rate=0.1, num_steps=500)
    found = lines_of(with_optim(lr=stairs, gamma=linear(1e-3, 1e-5, 2000)))
    assert "2 stairs of 500 steps x 0.1" in found["schedule of lr"].why
    assert "after 2,000 steps, but the run has 1,104" in found["schedule of gamma"].why


def test_driven_hyperparameter_is_named_first() -> None:
    changes = {"gamma": constant(1e-6), "threshold": constant(1.0)}
    config = with_optim(**changes, transitions=TransitionConfig(drives="threshold"))
    first, *_ = advise(make_outlook(config, 6000, GRADIENT))
    assert (first.quantity, first.value, first.verdict) == ("threshold is driven", "from 1", "look")
    assert "what follows is for its beginning" in first.why
    found = lines_of(config)
    assert found["schedule of threshold"].why == "driven from here"
    assert found["schedule of gamma"].why == "constant"
    assert "wrong" in {line.verdict for line in lines_of(with_optim(**changes)).values()}
    assert "wrong" not in {line.verdict for line in found.values()}  # the controller may lower it


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_a_few_steps(steps: int) -> None:
    found = lines_of(dataclasses.replace(SMALL, epochs=1), num_images=128 * steps)
    places = {1: ["start"], 2: ["start", "end"], 3: ["start", "end"]}[steps]  # the middle of 2 and 3 steps is the first
    assert [quantity for quantity in found if quantity.startswith("threshold against r")] == [
        f"threshold against r, {place}" for place in places
    ]
    flips = {1: ["1", "1 (end)"], 2: ["1", "1 (middle)", "2 (end)"], 3: ["1", "1 (middle)", "2", "3 (end)"]}[steps]
    assert [quantity for quantity in found if quantity.startswith("flips")] == [
        f"flips at step {each}" for each in flips
    ]
    assert found["flips at step 1"].value == "50 %"
    assert found["schedule of gamma"].value.startswith("0.0003 -> ")


def test_images_of_an_unknown_data_set() -> None:
    data = dataclasses.replace(SMALL.data, root="/nowhere")
    assert count_images(data, 1000)[0] == 1_281_167
    with pytest.raises(ValueError, match="Pass --images N"):
        count_images(data, 7)
    with pytest.raises(ValueError, match="128, more than the 100 training images"):
        make_outlook(SMALL, 100)


def test_gradient_of_noise_is_taken_to_the_batch(tiny_images: Path) -> None:
    model = dataclasses.replace(SMALL.model, width=8, num_classes=4)
    data = dataclasses.replace(SMALL.data, root=str(tiny_images))
    tiny = dataclasses.replace(SMALL, global_batch_size=4, model=model, data=data, num_threads=1)
    few = measure_gradient(tiny)
    assert few is not None
    assert (few.num_images, few.images) == (4, f"of {tiny_images}")
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
    assert text.endswith("gradients that are independent normal numbers: noise.")
    other = Outlook(config=with_optim(rule="two_ema"), num_images=6000)
    assert format_advice(other, "given", [Line("a", "1", "ok", "short")]).endswith("1 ok, 0 look, 0 wrong.")
