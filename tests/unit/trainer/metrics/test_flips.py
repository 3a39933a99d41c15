"""The same flip ratios from whole weights, from the slices, and with the diagnostics."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.diagnostics import BitDiagnostics
from bitfleet.trainer.metrics.step_observer import DiagnosedFlips, SlicedFlips, WholeFlips, step_flips
from bitfleet.trainer.ranks.collectives import Ranks

ALONE = Ranks(0, 1, 0, 1)


@pytest.mark.usefixtures("process_group")
def test_all_ways_count_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7, bias=False), nn.Linear(7, 5, bias=False))
    for param in model.parameters():
        param.data.sign_()
        param.binary = True
    named = list(model.named_parameters())
    plain = RoutedOptimizer([{"params": named, "rule": "bop", "gamma": 0.5, "threshold": 0.01}])
    sharded = ShardedOptimizer(plain)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0)
    ways = [
        step_flips(engine, model, plain, ALONE, None),
        step_flips(engine, model, sharded, ALONE, None),
        step_flips(engine, model, sharded, ALONE, BitDiagnostics(sharded)),
    ]
    assert [type(way) for way in ways] == [WholeFlips, SlicedFlips, DiagnosedFlips]
    for is_wanted in (True, False, True):
        for way in ways if is_wanted else ():
            way.before_step()
        model(torch.randn(4, 9)).square().mean().backward()
        sharded.step()
        if is_wanted:
            whole, sliced, diagnosed = (way.report(way.take().tolist()) for way in ways)
            assert whole.ratios == sliced.ratios == diagnosed.ratios
            assert (
                list(whole.ratios)
                == list(sliced.ratios)
                == ["flip_ratio", "flip_ratio/0.weight", "flip_ratio/1.weight"]
            )
            assert 0.0 < whole.ratios["flip_ratio"] < 1.0
            assert whole.diagnostics == sliced.diagnostics == {}
            assert diagnosed.diagnostics["flip_ratio"] == whole.ratios["flip_ratio"]
        assert len(sharded.observers) == 1  # between the steps only the diagnostics look
    sharded.close()
