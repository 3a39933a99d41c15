"""Advice on configurations: the lines, and when they warn."""

import dataclasses
import functools
from pathlib import Path

import pytest

from bitfleet.configs import available, load_config
from bitfleet.launch.advise.advice import advise, as_table
from bitfleet.launch.advise.outlook import Gradient, Line, Outlook, count_images, measure_gradient
from bitfleet.optim import OptimConfig, Schedule, binary_rules, constant, linear, with_rule
from bitfleet.optim.transitions import TransitionConfig
from bitfleet.trainer.config import TrainConfig

SMALL = load_config("fashion_quickstart")
GRADIENT = Gradient(1e-4, {"first": 1e-3, "last": 1e-5}, "of nothing")


@functools.cache
def lines_of(config: TrainConfig, num_images: int = 6000, smallest: float | None = 1e-5) -> dict[str, Line]:
    gradient = None if smallest is None else GRADIENT._replace(layers={"first": 1e-3, "last": smallest})
    lines = advise(Outlook(config=config, num_images=num_images, gradient=gradient))
    assert len({line.quantity for line in lines}) == len(lines)
    return {line.quantity: line for line in lines}


def with_optim(config: TrainConfig = SMALL, *, rule: str = "bop2ndorder", **changes: object) -> TrainConfig:
    optim = with_rule(config.optim, rule)
    return dataclasses.replace(config, optim=dataclasses.replace(optim, **changes))  # type: ignore[arg-type]


def defaults_of(rule: str, **changes: object) -> TrainConfig:
    return dataclasses.replace(SMALL, optim=OptimConfig(rule=rule, **changes))  # type: ignore[arg-type]


def test_an_end_without_a_kind_is_named() -> None:
    for end, verdict in ((0.0, "ok"), (1e-4, "look")):
        line = lines_of(with_optim(lr=Schedule(start=1e-3, end=end)))["schedule of lr"]
        assert line.verdict == verdict
    assert "0.0001" in line.reason


def test_nothing_is_wrong_with_the_shipped_ones() -> None:
    for name in available():
        config = load_config(name)
        is_embedded = config.data.root == "fashion-mnist"  # unpacking its images takes long
        num_images = 6000 if is_embedded else count_images(config.data, config.model.num_classes)[0]
        lines = lines_of(config, num_images)
        assert {line.verdict for line in lines.values()} <= {"ok", "look"}, name
        if config.optim.rule == "bop2ndorder":
            assert lines["flips at step 1"].value == "50 %"
            assert "w is -sign(m)" in lines["threshold against r, start"].reason


def test_a_warm_up_is_shown_with_its_top() -> None:
    warm = Schedule(start=0.01, kind="warmup_cosine", warmup_epochs=2)
    lines = lines_of(defaults_of("latent_adam", latent_lr=warm))
    assert lines["schedule of latent_lr"].value == "0 -> 0.01 -> 0"
    assert lines["at twice the batch"].value == "latent_lr 0.02"


def test_numbers_of_the_quickstart() -> None:
    lines = lines_of(SMALL)
    assert "|r| is 0.03 " in lines["flips at step 1"].reason
    assert lines["flips at step 2"].value == "25 %"
    assert lines["flips at step 10"].value == "10 %"
    assert lines["memory 1/gamma"].verdict == "look"  # 3,333 steps, the run has 1,104
    assert lines["memory 1/gamma"].value.startswith("3,333 -> 63,812 steps")
    assert "4.27e+05 images" in lines["memory 1/gamma"].reason  # 128 per step
    assert "step 466" in lines["memory 1/sigma"].reason
    assert "22 before its end, 1e-05" in lines["schedule of gamma"].reason  # 1,125 to 1,104


def test_a_run_from_weights_flips_little_at_first_if_its_state_is_seeded() -> None:
    config = dataclasses.replace(SMALL, init=Path("w.safetensors"))
    lines = lines_of(config)
    assert lines["flips at step 1"].value == "under 1 %"
    assert "flips at step 2" not in lines
    lost = lines_of(dataclasses.replace(config, optim=dataclasses.replace(config.optim, init_inertia=0.0)))
    assert lost["flips at step 1"].verdict == "wrong"
    assert "w.safetensors" in lost["flips at step 1"].reason


def test_step_1_under_each_threshold() -> None:
    """gamma / sqrt(sigma) is 0.03."""
    assert lines_of(with_optim(threshold=constant(0.029)))["flips at step 1"].value == "50 %"
    held = lines_of(with_optim(threshold=constant(0.031)))["flips at step 1"]
    assert (held.value, held.verdict) == ("0 %", "look")


def test_a_gamma_that_starts_at_0() -> None:
    lines = lines_of(with_optim(gamma=linear(0.0, 1e-3)))
    assert (lines["flips at step 1"].value, lines["flips at step 1"].verdict) == ("0 %", "look")
    assert lines["memory 1/gamma"].value.startswith("endless -> 1,0")


@pytest.mark.parametrize("rule", ["bop", "bop2ndorder"])
@pytest.mark.parametrize("threshold", [0.0, 1e-9])
def test_a_gamma_that_is_0_for_a_time(rule: str, threshold: float) -> None:
    """At its start, and after a schedule that ends within the run."""
    late = Schedule(start=0.0, end=1e-3, kind="polynomial", delay_steps=600)
    lines = lines_of(with_optim(rule=rule, gamma=late, threshold=constant(threshold)))
    assert lines["flips at step 552 (middle)"].verdict == "wrong"
    assert lines["fp32: m at the end"].verdict == "wrong"  # in the middle it stands still
    lines = lines_of(with_optim(rule=rule, gamma=linear(1e-3, 0.0, 800), threshold=constant(threshold)))
    assert lines["flips at step 1,104 (end)"].value == "0 %"
    assert "gamma is 0" in lines["threshold against r, end"].reason


def test_a_sigma_that_starts_at_0() -> None:
    lines = lines_of(with_optim(sigma=linear(0.0, 1e-2)))
    assert (lines["fp32: small gradients"].value, lines["fp32: small gradients"].verdict) == ("any g", "look")
    assert lines["memory 1/sigma"].value.startswith("endless -> ")
    late = Schedule(start=0.0, end=1e-2, kind="polynomial", delay_steps=600)
    assert lines_of(with_optim(sigma=late))["fp32: v at the end"].verdict == "wrong"


def test_adams_correction_is_exact_for_a_constant_only() -> None:
    held = lines_of(with_optim(sigma=constant(1e-2), correction="adam"))["memory 1/sigma"]
    assert "in part" not in held.reason
    rising = lines_of(with_optim(sigma=linear(1e-4, 1e-2), correction="adam"))["memory 1/sigma"]
    assert "in part" in rising.reason


def test_bop_needs_the_gradient() -> None:
    config = with_optim(rule="bop", threshold=constant(3e-8))
    lines = lines_of(config)  # m is 3e-4 * 1e-4 = 3e-8 of one standard deviation: half of 31.7 %
    assert lines["flips at step 1"].value in ("15 %", "16 %")  # simulated
    assert not any("sigma" in quantity for quantity in lines)
    unknown = lines_of(config, smallest=None)["flips at step 1"]
    assert (unknown.value, unknown.verdict) == ("unknown", "look")


def test_threshold_out_of_reach_is_wrong() -> None:
    lines = lines_of(with_optim(threshold=constant(1.0)))
    assert lines["threshold against r, middle"].verdict == "wrong"
    assert lines["flips at step 552 (middle)"].verdict == "wrong"
    assert lines["threshold against r, end"].verdict == "look"  # a still end may be intended


def test_threshold_of_the_size_of_noise_matters() -> None:
    constants = with_optim(gamma=constant(1e-7), sigma=constant(1e-3), threshold=constant(1e-6))
    assert "the threshold matters" in lines_of(constants)["threshold against r, middle"].reason
    assert "but a few weights" in lines_of(SMALL)["threshold against r, end"].reason


def test_moments_that_fp32_does_not_move() -> None:
    gone = with_optim(gamma=linear(3e-4, 1e-13, 100), sigma=linear(1e-2, 1e-12, 100))
    lines = lines_of(gone)
    assert lines["fp32: m at the end"].verdict == lines["fp32: v at the end"].verdict == "wrong"
    late = lines_of(with_optim(gamma=linear(3e-4, 1e-13, 1000)))["fp32: m at the end"]
    assert late.verdict == "look"  # it moves until the last tenth of the run
    assert lines["schedule of gamma"].verdict == "look"
    assert "step 100 of 1,104" in lines["schedule of gamma"].reason


def test_small_gradients() -> None:
    """sqrt(v) is 0.01 of the gradient at step 1."""
    verdicts = [lines_of(SMALL, smallest=smallest)["fp32: small gradients"].verdict for smallest in (1e-5, 1e-9, 1e-18)]
    assert verdicts == ["ok", "look", "wrong"]


def test_flips_that_end_are_not_ok() -> None:
    """The quickstart's threshold grows a thousandfold; r without a second moment does not."""
    lines = lines_of(with_optim(rule="bop"))
    for step, verdict in (("552 (middle)", "wrong"), ("1,000", "look"), ("1,104 (end)", "look")):
        line = lines[f"flips at step {step}"]
        assert (line.value, line.verdict) == ("0 %", verdict)


def test_schedules_and_the_run_they_belong_to() -> None:
    stairs = dataclasses.replace(SMALL.optim.lr, kind="exponential", rate=0.1, num_steps=500)
    lines = lines_of(with_optim(lr=stairs, gamma=linear(1e-3, 1e-5, 2000)))
    assert "2 stairs of 500 steps x 0.1" in lines["schedule of lr"].reason
    assert lines["schedule of gamma"].verdict == "look"
    assert "2,000 steps" in lines["schedule of gamma"].reason


def test_a_schedule_ends_where_its_values_do() -> None:
    """The quickstart has 1,104 steps, and 1,125 without dropping the last images of an epoch."""
    late = dataclasses.replace(SMALL.optim.lr, kind="exponential", rate=0.1, num_steps=200, delay_steps=900)
    lines = lines_of(with_optim(lr=late, gamma=Schedule(start=1e-3, kind="polynomial", delay_steps=300)))
    assert (lines["schedule of gamma"].verdict, lines["schedule of lr"].verdict) == ("ok", "ok")
    assert "22 before its end" in lines["schedule of gamma"].reason
    assert lines["schedule of lr"].reason.startswith("1 stairs of 200 steps")
    for kind in ("stairs", "warmup_cosine"):
        line = lines_of(with_optim(lr=Schedule(start=1e-3, kind=kind)))["schedule of lr"]
        assert (line.value.split()[-1], line.reason) == ("0", "it reaches its end, 0")


def test_driven_hyperparameter_is_named_first() -> None:
    changes = {"gamma": constant(1e-6), "threshold": constant(1.0)}
    config = with_optim(**changes, transitions=TransitionConfig(drives="threshold"))
    lines = lines_of(config)
    first = next(iter(lines.values()))
    assert (first.quantity, first.value, first.verdict) == ("threshold is driven", "from 1", "look")
    assert "driven" in lines["schedule of threshold"].reason
    assert lines["schedule of gamma"].reason == "constant"
    assert "wrong" in {line.verdict for line in lines_of(with_optim(**changes)).values()}
    assert "wrong" not in {line.verdict for line in lines.values()}  # the controller may lower it


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_a_few_steps(steps: int) -> None:
    lines = lines_of(dataclasses.replace(SMALL, epochs=1), num_images=128 * steps)
    points = {1: ["start"], 2: ["start", "end"], 3: ["start", "end"]}[steps]  # the middle is step 1
    assert [quantity for quantity in lines if quantity.startswith("threshold against r")] == [
        f"threshold against r, {point}" for point in points
    ]
    flips = {1: ["1", "1 (end)"], 2: ["1", "1 (middle)", "2 (end)"], 3: ["1", "1 (middle)", "2", "3 (end)"]}[steps]
    assert [quantity for quantity in lines if quantity.startswith("flips")] == [
        f"flips at step {each}" for each in flips
    ]
    assert lines["flips at step 1"].value == "50 %"
    assert lines["schedule of gamma"].value.startswith("0.0003 -> ")


@pytest.mark.parametrize("rule", binary_rules())
def test_every_rule_has_its_lines(rule: str) -> None:
    for smallest in (1e-5, None):
        lines = lines_of(defaults_of(rule), smallest=smallest)
        names = binary_rules()[rule]
        assert {f"schedule of {name}" for name in names if isinstance(names[name], Schedule)} <= lines.keys()
        assert {f"memory 1/{name}" for name in ("gamma", "alpha") if name in names} <= lines.keys()
        assert ("flips" in lines) == (rule not in ("bop", "bop2ndorder"))


def test_rule_without_a_theory_gets_a_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new rule would, whatever the names of its hyperparameters."""
    config = defaults_of("latent_sgd", latent_lr=None)
    object.__setattr__(config.optim, "latent_lr", None)
    object.__setattr__(config.optim, "rule", "sign_of_tomorrow")
    lines = lines_of(config)
    assert lines.keys() == {"flips", "schedule of lr"}
    assert lines["flips"].reason == "no prediction for this rule"


@pytest.mark.parametrize("rule", binary_rules())
def test_twice_the_batch_is_as_far_in_half_of_the_steps(rule: str) -> None:
    config = defaults_of(rule)
    line = lines_of(config)["at twice the batch"]
    said = dict(part.split() for part in line.value.split(", "))
    for name, value in said.items():
        now = getattr(config.optim, name)
        assert float(value) == pytest.approx(2 * (now if isinstance(now, float) else now.over(1104)(0)), rel=1e-2)
    averages = {"two_ema": {"gamma", "alpha"}, "diode": {"gamma", "alpha"}, "bop": {"gamma"}}
    averages["bop2ndorder"] = {"gamma", "sigma"}  # else v settles after twice as many images
    assert said.keys() == {"bnew": {"latent_lr", "rho"}, **averages}.get(rule, {"latent_lr"})


def test_learning_rate_of_latent_weights_should_fall() -> None:
    for rate, verdict in ((constant(1e-3), "look"), (linear(1e-3, 0.0), "ok")):
        assert lines_of(defaults_of("latent_adam", latent_lr=rate))["schedule of latent_lr"].verdict == verdict
    driven = lines_of(defaults_of("latent_adam", transitions=TransitionConfig(drives="latent_lr")))
    assert driven["schedule of latent_lr"].verdict == "ok"


def test_images_of_an_unknown_data_set() -> None:
    data = dataclasses.replace(SMALL.data, root="/nowhere")
    assert count_images(data, 1000)[0] == 1_281_167
    with pytest.raises(ValueError, match="--images"):
        count_images(data, 7)
    with pytest.raises(ValueError, match="--global_batch_size is 128.* 100 "):
        Outlook(config=SMALL, num_images=100)


def test_gradient_of_noise_is_taken_to_the_batch(tiny_images: Path) -> None:
    model = dataclasses.replace(SMALL.model, width=8, num_classes=4)
    data = dataclasses.replace(SMALL.data, root=str(tiny_images))
    tiny = dataclasses.replace(SMALL, global_batch_size=4, model=model, data=data, num_threads=1)
    few = measure_gradient(tiny)
    assert few is not None
    assert f"4 images of {tiny_images}" in few.origin
    assert 0 < min(few.layers.values()) < few.rms < max(few.layers.values())
    elsewhere = dataclasses.replace(
        tiny, global_batch_size=40_000, data=dataclasses.replace(tiny.data, root="/nowhere")
    )
    many = measure_gradient(elsewhere)
    assert many is not None
    assert "390 images of random pixels" in many.origin
    # The gradient of 390 images is a tenth as noisy as that of 4; the batch scales it down.
    assert many.rms < 0.3 * few.rms


def test_a_network_that_cannot_train_on_the_images_is_one_sentence(tiny_images: Path) -> None:
    data = dataclasses.replace(SMALL.data, root=str(tiny_images))  # of 4 classes
    with pytest.raises(ValueError, match=r"model.num_classes is 10, but .* has 4 classes: pass --model.num_classes 4"):
        measure_gradient(dataclasses.replace(SMALL, data=data))
    small = load_config("binarynet_cifar10")
    with pytest.raises(ValueError, match="binarynet .*8"):
        measure_gradient(dataclasses.replace(small, data=dataclasses.replace(small.data, image_size=8)))


def test_table() -> None:
    outlook = Outlook(config=SMALL, num_images=6000)
    text = as_table(outlook, [Line("a", "1", "ok", "short"), Line("bb", "2", "wrong", "long " * 40)])
    assert text.startswith("fashion_quickstart: bop2ndorder, 1,104 steps, 24 epochs of 46 batches of 128; 6,000 images")
    assert "1 ok, 0 look, 1 wrong." in text
    assert max(map(len, text.splitlines()[2:-1])) <= 110
    assert text.endswith("noise.")
    other = Outlook(config=with_optim(rule="two_ema"), num_images=6000)
    assert as_table(other, [Line("a", "1", "ok", "short")]).endswith("1 ok, 0 look, 0 wrong.")
