"""Bytes on paper against the bytes that the collectives of a step are called with, for 1, 2 and 4
ranks in one process."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bitfleet.configs import load_config
from bitfleet.launch.bench.comm import CollectiveCounter
from bitfleet.launch.plan.traffic import Message, describe, traffic
from bitfleet.models import create_model
from bitfleet.optim import build_optimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.engine.engine import shard

STOP_MESSAGE = Message("all_reduce", 24)  # of stop.py, which has its own process group


@pytest.fixture
def pretended_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A process group whose other ranks do not exist: collectives return at once, and nothing
    arrives."""
    # What should have been received is whatever was in the memory otherwise: with a NaN there the
    # step is skipped.
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def config_of(engine: EngineConfig) -> TrainConfig:
    return dataclasses.replace(load_config("fashion_quickstart"), engine=engine, global_batch_size=8)


def counted_bytes(config: TrainConfig, world_size: int) -> float:
    """Return the collectives that the second step of this configuration has to send."""
    model = create_model(config.model)
    optimizer = shard(build_optimizer(model, config.optim, num_steps=10)[0], config.engine, world_size)
    statistics = RunningStatistics(model, world_size)
    for _ in range(2):
        with CollectiveCounter(world_size) as counter:
            with statistics.replica():
                torch.autograd.backward(model(torch.randn(8 // world_size, 3, 32, 32)).square().mean())
            optimizer.step()
            statistics.end_step()
    return counter.sent_bytes


@pytest.mark.parametrize("pretended_ranks", [1, 2, 4], indirect=True)
@pytest.mark.parametrize("grad_comm_dtype", ["fp32", "bf16"])
def test_traffic_is_what_the_collectives_are_called_with(
    grad_comm_dtype: Literal["fp32", "bf16"], pretended_ranks: int
) -> None:
    config = config_of(EngineConfig(check_every_steps=None, grad_comm_dtype=grad_comm_dtype))
    planned = traffic(describe(config), config, pretended_ranks).sent_bytes(pretended_ranks)
    counted = counted_bytes(config, pretended_ranks)
    if pretended_ranks == 1:
        assert planned == counted == 0
    else:
        assert planned == counted + STOP_MESSAGE.sent_bytes(pretended_ranks)


def test_traffic_of_the_other_shardings() -> None:
    # Per weight on 4 ranks, as docs/sharding.md counted; the rest is BatchNorm's statistics, and
    # what the ranks agree on.
    for sharding, per_weight in (("none", 6), ("zero1", 9), ("zero2", 9)):
        config = config_of(EngineConfig(sharding=sharding))  # type: ignore[arg-type]
        network = describe(config)
        sent = traffic(network, config, 4).sent_bytes(4)
        statistics = 3 * 4 * network.num_statistics
        assert sent == per_weight * network.num_parameters + statistics + STOP_MESSAGE.sent_bytes(4)


def test_bytes_for_a_binary_and_another_weight() -> None:
    config = load_config("xnornet_imagenet")
    network = describe(config)
    binary, others = 58_236_928, 4_150_176
    assert network.num_parameters == binary + others
    for world_size in (2, 4, 64):
        sent = traffic(network, config, world_size).sent_bytes(world_size)
        statistics = (world_size - 1) * 4 * network.num_statistics
        formula = (world_size - 1) / world_size * (binary * (4 + 1 / 8) + others * 8) + statistics  # docs/sharding.md
        assert formula <= sent < 1.001 * formula
    # The layers of the classifier come last and are reached first; the first convolution's bucket
    # goes at the end.
    ready = [message.ready for message in traffic(network, config, 2).gradients]
    assert ready == sorted(ready)
    assert ready[0] < 0.1
    assert ready[-1] == 1.0


def test_between_nodes_a_flat_all_to_all_is_dearer_than_a_ring_and_halving_is_not() -> None:
    # As docs/sharding.md counted between two hosts of two ranks, for a rank: 2.08 and 3.03 bytes
    # per binary weight.
    assert Message("all_to_all", 4).between_bytes(2, 2) == 4
    assert Message("all_gather", 1 / 8).between_bytes(2, 2) == 3 / 32
    assert Message("all_reduce", 4).between_bytes(2, 2) == 6
    assert Message("all_reduce", 4).between_bytes(1, 4) == 0
    assert Message("all_to_all", 4).between_bytes(8, 8) == 28  # docs/sharding.md
    assert Message("halving", 4).between_bytes(2, 2) == 2
    assert Message("halving", 4).between_bytes(8, 8) == 3.5
    for kind in ("halving", "all_to_all", "all_gather", "all_reduce"):
        message = Message(kind, 1.0)  # type: ignore[arg-type]
        assert message.between_bytes(4, 1) == message.sent_bytes(4)


def test_zero3_is_refused() -> None:
    config = config_of(EngineConfig(sharding="zero3"))
    with pytest.raises(ValueError, match='engine.sharding .*"zero3"'):
        traffic(describe(config), config, 2)
