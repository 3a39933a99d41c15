"""The counts over flips and moments against numpy on unpacked weights; on several ranks:
tests/distributed."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitfleet.optim import RULES, RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.diagnostics import (
    HIGHEST,
    KEYS,
    LOWEST,
    NUM_BINS,
    BitDiagnostics,
    FlipHistory,
    octave_counts,
    octave_edges,
)

BOP = {"rule": "bop", "gamma": 0.02, "threshold": 0.05}


def make(rule: dict[str, Any], numel: int = 1001, *, defers: bool = False) -> tuple[nn.Parameter, ShardedOptimizer]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(numel).sign())
    return param, ShardedOptimizer(RoutedOptimizer([{"params": [("w", param)], **rule}]), defers=defers)


def step(param: nn.Parameter, sharded: ShardedOptimizer, grad: Tensor) -> Tensor:
    """One update with `grad`; which weights it flipped."""
    before = param.detach().clone()
    (param * grad).sum().backward()
    sharded.step()
    return before != param.detach()


def read(diagnostics: BitDiagnostics) -> dict[str, Any]:
    return diagnostics.values(diagnostics.take().tolist())


def test_octaves_are_those_of_the_logarithm() -> None:
    values = torch.tensor([0.0, 1e-30, 2.0**-10, 1.9999 * 2.0**-10, 2.0**-9, 1.0, 3.0, 2.0**30, float("inf")])
    expected = [0, 0, -10 - LOWEST, -10 - LOWEST, -9 - LOWEST, -LOWEST, 1 - LOWEST, NUM_BINS - 1, NUM_BINS - 1]
    assert octave_counts(values).tolist() == np.bincount(expected, minlength=NUM_BINS).tolist()
    edges = octave_edges()
    assert len(edges) == NUM_BINS + 1
    assert 10 ** edges[0] == pytest.approx(2.0**LOWEST, rel=1e-3)
    assert 10 ** edges[-1] == pytest.approx(2.0**HIGHEST, rel=1e-3)


def test_four_flips_make_an_oscillator_and_more_stay_one() -> None:
    """Bit i of the byte flips i times, in steps that are not the first ones."""
    history = FlipHistory(8, torch.device("cpu"))
    for number in range(9):
        history.add_(torch.tensor([sum(1 << i for i in range(8) if number > 8 - i)], dtype=torch.uint8))
    assert int(history.fours) == 0b11110000
    assert int(history.flipped) == 0b11111110
    history.end_window_()
    assert (int(history.oscillated), int(history.fours), int(history.flipped)) == (0b11110000, 0, 0b11111110)
    history.add_(torch.tensor([255], dtype=torch.uint8))
    assert (int(history.ones), int(history.twos), int(history.fours)) == (255, 0, 0)


def test_windows_of_a_hundred_steps() -> None:
    """Against counts of every weight; the report of a step is about the last window that was over
    by then."""
    param, sharded = make(BOP)
    diagnostics = BitDiagnostics(sharded)
    flips: list[Tensor] = []
    for number in range(1, 251):
        diagnostics.wanted = number in (99, 100, 150, 200, 250)
        wanted = diagnostics.wanted
        flips.append(step(param, sharded, torch.randn(param.shape)))
        if not wanted:
            continue
        values = read(diagnostics)
        last = number // 100
        if last:
            window = torch.stack(flips[100 * (last - 1) : 100 * last]).sum(0)
            assert values["oscillators"] == values["oscillators/w"] == int((window >= 4).sum()) / 1001
            assert 0 < values["oscillators"] < 1
        else:
            assert "oscillators" not in values
        assert values["flip_ratio"] == int(flips[-1].sum()) / 1001
        assert values["never_flipped"] == int((~torch.stack(flips).any(0)).sum()) / 1001
        assert values["pi"] == math.log(values["flip_ratio"] + math.exp(-9))
    sharded.close()


@pytest.mark.parametrize(
    "rule",
    [
        BOP,
        *(
            {"rule": "bop2ndorder", "gamma": 0.1, "sigma": 0.01, "threshold": 0.5, "correction": correction}
            for correction in ("none", "as_coded", "adam")
        ),
    ],
    ids=lambda rule: rule.get("correction", "bop"),
)
def test_the_ratio_is_the_one_that_flips(rule: dict[str, Any]) -> None:
    """A -1 with r < -threshold and a +1 with r > threshold flip, no other: so r is the rule's
    own."""
    param, sharded = make(rule)
    diagnostics = BitDiagnostics(sharded)
    for number in range(1, 8):
        before, grad = param.detach().clone(), torch.randn(param.shape)
        diagnostics.wanted = True
        flips = step(param, sharded, grad)
        (bucket,) = sharded.buckets
        state = bucket.state | {"step": torch.tensor(float(number))}
        assert bucket.rule.ratio is not None
        ratio = bucket.rule.ratio(state, bucket.group)[:1001]
        assert torch.equal(flips, before * ratio > rule["threshold"])
        values = read(diagnostics)
        assert values["dead_band"] == int((ratio.abs() <= rule["threshold"]).sum()) / 1001
        assert values["sign_agreement"] == int((grad.sign() == bucket.state["exp_avg"][:1001].sign()).sum()) / 1001
        histogram = values["log_ratio"]
        assert sum(histogram["counts"]) == 1001
        expected, _ = np.histogram(np.log2(ratio.abs().numpy()), np.arange(LOWEST, HIGHEST + 1))
        assert histogram["counts"] == expected.tolist()
        assert values["threshold"] == rule["threshold"]
    sharded.close()


@pytest.mark.parametrize("defers", [False, True])  # as on a GPU
def test_a_skipped_step_is_not_reported_but_counts_for_the_window(defers: bool) -> None:
    param, sharded = make(BOP, defers=defers)
    diagnostics = BitDiagnostics(sharded)
    step(param, sharded, torch.randn(param.shape))
    diagnostics.wanted = True
    step(param, sharded, torch.full(param.shape, torch.nan))
    counts = diagnostics.take().tolist()
    assert diagnostics.values(counts) == {}
    assert diagnostics.flip_ratios(counts) == {"flip_ratio": 0.0, "flip_ratio/w": 0.0}
    sharded.num_steps = 99
    step(param, sharded, torch.full(param.shape, torch.nan))  # the last one of a window
    diagnostics.wanted = True
    flips = step(param, sharded, torch.randn(param.shape))
    values = read(diagnostics)
    assert values["flip_ratio"] == int(flips.sum()) / 1001
    assert values["oscillators"] == 0.0
    sharded.close()


def test_a_history_that_begins_late_waits_for_a_whole_window() -> None:
    param, sharded = make(BOP)
    diagnostics = BitDiagnostics(sharded)
    seen = []
    for done in (150, 199, 250, 299):
        sharded.num_steps = done
        if done == 150:
            diagnostics.begin(150)
        diagnostics.wanted = True
        step(param, sharded, torch.randn(param.shape))
        values = read(diagnostics)
        assert values["since"] == 150
        seen.append("oscillators" in values)
    assert seen == [False, False, False, True]
    sharded.close()


def test_a_rule_without_a_ratio_leaves_out_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "bop", dataclasses.replace(RULES["bop"], ratio=None))
    param, sharded = make(BOP)
    diagnostics = BitDiagnostics(sharded)
    diagnostics.wanted = True
    step(param, sharded, torch.randn(param.shape))
    found = {key.split("/")[0] for key in read(diagnostics)}
    assert found == {*KEYS, "pi", "since"} - {"dead_band", "oscillators"}
    sharded.close()


def test_no_binary_weights() -> None:
    _, sharded = make({"rule": "keras_adam", "betas": (0.9, 0.999), "eps": 1e-7, "lr": 1e-2, "weight_decay": 0.0})
    with pytest.raises(ValueError, match="keras_adam"):
        BitDiagnostics(sharded)
    sharded.close()
