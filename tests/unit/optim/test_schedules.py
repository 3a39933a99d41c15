import dataclasses
import math

import pytest
import torch

from bitfleet.optim import Bop2ndOrder, HyperparameterScheduler, Schedule, constant, linear


def test_linear_is_keras_polynomial_decay() -> None:
    gamma = linear(1e-4, 1e-9, 125_113)
    assert gamma(0) == 1e-4
    # The last of the paper's 125,100 XNOR-Net steps stops short of the end (decay_steps is
    # 125,113).
    assert gamma(125_099) == pytest.approx(1.22e-8, rel=1e-2)
    assert gamma(125_113) == gamma(10**9) == 1e-9


def test_power_staircase_and_cosine() -> None:
    square = Schedule(start=1.0, end=0.0, kind="polynomial", num_steps=10, power=2.0)
    assert square(5) == 0.25
    stairs = Schedule(start=1.0, kind="exponential", num_steps=100, rate=0.1)
    assert [stairs(step) for step in (0, 99, 100, 250)] == pytest.approx([1.0, 1.0, 0.1, 0.01])
    cosine = Schedule(start=1.0, end=0.2, kind="cosine", num_steps=10)
    assert [cosine(step) for step in (0, 5, 10, 20)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_warmup_cosine_is_quicknets() -> None:
    """600 epochs of 625 steps, 5 of them warm-up, as training/learning_schedules.py of larq-zoo:
    PolynomialDecay over 3,124 steps, then CosineDecay over 375,000 - 3,125 - 1."""
    lr = Schedule(start=0.1, kind="warmup_cosine", warmup_epochs=5).over(375_341, num_epochs=600, steps_per_epoch=625)
    assert (lr.num_steps, lr.warmup_steps) == (375_000, 3125)
    assert lr(0) == 0.0
    assert lr(1562) == pytest.approx(0.05)
    assert lr(3124) == lr(3125) == 0.1
    assert lr(3125 + 371_874 // 2) == pytest.approx(0.05)
    assert lr(3125 + 371_874 // 4) == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)), rel=1e-4)
    assert lr(374_998) > 0.0
    assert lr(374_999) == lr(10**9) == 0.0
    given = Schedule(start=1.0, end=0.5, kind="warmup_cosine", warmup_steps=3, num_steps=8).over(100)
    assert [given(step) for step in range(9)] == pytest.approx(
        [0.0, 0.5, 1.0, 1.0, 0.926777, 0.75, 0.573223, 0.5, 0.5], abs=1e-6
    )


def test_stairs_are_reactnets_lambda_schedule() -> None:
    """Its loop calls scheduler.step() before each epoch, so the last of them has a learning rate of
    0."""
    num_epochs, steps = 128, 3
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=2.5e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / num_epochs)
    optimizer.step()
    lr = Schedule(start=2.5e-3, kind="stairs").over(400, num_epochs=num_epochs, steps_per_epoch=steps)
    for epoch in range(num_epochs):
        scheduler.step()
        assert {lr(epoch * steps + step) for step in range(steps)} == {scheduler.get_last_lr()[0]}
    assert lr(127 * steps) == 0.0
    assert lr(126 * steps) > 0.0
    assert Schedule(start=1.0, end=0.5, kind="stairs", stairs=2, num_steps=10).over(3)(4) == 0.75


def test_warmup_multiplies() -> None:
    warm = Schedule(start=1.0, warmup_steps=4)
    assert [warm(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1.0}, "start of a schedule"),
        ({"start": math.nan}, "start of a schedule"),
        ({"start": 1.0, "num_steps": 0}, "num_steps"),
        ({"start": 1.0, "share": 0.0}, r"share of a schedule must be in \(0, 1\], not 0.0"),
        ({"start": 1.0, "warmup_steps": -1}, "warmup_steps"),
        ({"start": 1.0, "warmup_epochs": 5.0}, "warmup_epochs .* is 5.0: it needs kind warmup_cosine, not constant"),
        ({"start": 1.0, "kind": "cosine", "stairs": 5}, "stairs .* not 5 with cosine"),
        ({"start": 1.0, "kind": "stairs", "stairs": 0}, "stairs .* at least 1"),
        ({"start": 1.0, "kind": "stairs", "share": 0.5}, "a stairs schedule lasts the whole run"),
        ({"start": 1.0, "kind": "warmup_cosine", "delay_steps": 5}, "a warmup_cosine schedule lasts the whole run"),
        ({"start": 1.0, "kind": "linear"}, "kind of a schedule must be one of constant, polynomial, .*, not 'linear'"),
    ],
)
def test_bad_values_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**options)  # type: ignore[arg-type]


def test_open_length_must_be_filled_before_use() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        linear(1.0, 0.0)(0)
    for kind in ("stairs", "warmup_cosine"):
        with pytest.raises(ValueError, match="num_steps"):
            Schedule(start=1.0, kind=kind)(0)  # type: ignore[arg-type]
    assert linear(1.0, 0.0).over(10)(5) == 0.5
    assert linear(1.0, 0.0, 20).over(10)(5) == 0.75
    stairs = Schedule(start=1.0, kind="exponential", rate=0.1, share=0.25).over(10)  # 2.5 steps, to even
    assert [stairs(step) for step in (0, 1, 2, 4)] == pytest.approx([1.0, 1.0, 0.1, 0.01])
    assert Schedule(start=1.0, share=0.01).over(10).num_steps == 1


def test_an_open_length_after_a_delay() -> None:
    """A decay ends where it would without the delay; a stair keeps its length."""
    delayed = Schedule(start=1.0, end=0.0, kind="polynomial", share=0.5, delay_steps=10).over(60)
    assert [delayed(step) for step in (0, 10, 20, 30)] == [1.0, 1.0, 0.5, 0.0]
    stairs = Schedule(start=1.0, kind="exponential", rate=0.5, share=0.25, delay_steps=30).over(40)
    assert [stairs(step) for step in (39, 40, 49, 50)] == [1.0, 0.5, 0.5, 0.25]
    assert Schedule(start=1.0, share=0.25, delay_steps=30).over(40)(35) == 1.0
    late = Schedule(start=1.0, kind="cosine", share=0.25, delay_steps=10)
    with pytest.raises(ValueError, match="delay_steps .*10.* 10 steps"):
        late.over(40)
    assert late.over(44).num_steps == 1


@pytest.mark.parametrize("length", [{"num_steps": 23}, {"share": 0.023}])
def test_stairs_that_grow_beyond_float32_are_refused(length: dict[str, float]) -> None:
    grows = Schedule(start=1e-3, kind="exponential", rate=10.0, **length)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"from 0.001 that grows 10 times every 23 steps overflows in a run of 1,000"):
        grows.over(1000)
    assert dataclasses.replace(grows, num_steps=25).over(1000)(1000) == pytest.approx(1e37)


def test_values_beyond_float32_are_refused() -> None:
    assert constant(3.4e38)(0) == 3.4e38
    with pytest.raises(ValueError, match=r"start of a schedule must be finite in float32 and not negative, not 1e\+39"):
        constant(1e39)


def test_scheduler_writes_the_value_of_the_coming_step() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Bop2ndOrder([{"params": [weight], "name": "binary"}], gamma=0.5, sigma=0.5, threshold=0.0)
    scheduler = HyperparameterScheduler(optimizer, {"binary": {"gamma": linear(0.4, 0.2, 4), "sigma": constant(0.1)}})
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["gamma"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.4, 0.35, 0.3, 0.25])
    assert optimizer.param_groups[0]["sigma"] == 0.1

    again = HyperparameterScheduler(optimizer, scheduler.schedules)
    assert optimizer.param_groups[0]["gamma"] == pytest.approx(0.4)
    again.load_state_dict(scheduler.state_dict())
    assert optimizer.param_groups[0]["gamma"] == pytest.approx(0.2)


def test_scheduler_refuses_a_group_that_is_not_there() -> None:
    optimizer = Bop2ndOrder(
        [{"params": [torch.nn.Parameter(torch.ones(3))], "name": "binary"}], gamma=1, sigma=1, threshold=0
    )
    with pytest.raises(ValueError, match=r"\['binry'\].*\['binary'\]"):
        HyperparameterScheduler(optimizer, {"binry": {"gamma": constant(0.1)}})


def test_scheduler_refuses_a_hyperparameter_that_is_not_there() -> None:
    optimizer = Bop2ndOrder(
        [{"params": [torch.nn.Parameter(torch.ones(3))], "name": "binary"}], gamma=1, sigma=1, threshold=0
    )
    with pytest.raises(ValueError, match=r"\['gama'\], which the group 'binary' .* it has \['correction', 'gamma', "):
        HyperparameterScheduler(optimizer, {"binary": {"gama": constant(0.1)}})


def test_scheduler_passes_by_groups_without_a_name() -> None:
    optimizer = Bop2ndOrder([torch.nn.Parameter(torch.ones(3))], gamma=1, sigma=1, threshold=0)
    HyperparameterScheduler(optimizer, {}).step()
    with pytest.raises(ValueError, match=r"\['binary'\]; the groups are \[\], each by its key \"name\""):
        HyperparameterScheduler(optimizer, {"binary": {"gamma": constant(0.1)}})
