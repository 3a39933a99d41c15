"""What preflight predicts, by hand: traffic and memory of small buckets."""

import dataclasses

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.preflight.memory import BucketShape, Memory, bucket_shapes, predict_memory
from bitfleet.launch.preflight.preflight import sent_bytes
from bitfleet.launch.preflight.rehearsal import difference
from bitfleet.launch.text import clock, megabytes
from bitfleet.models import create_model
from bitfleet.optim import ShardedOptimizer, build_optimizer
from bitfleet.trainer.checkpoint.format import model_signature
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.metrics import MetricsConfig

BUCKETS = [BucketShape(("a", "b"), 1024, True, 2), BucketShape(("c",), 128, False, 2)]


def test_traffic_is_the_formula_of_the_docs() -> None:
    def per_step(world_size: int, num_replicas: int | None = None, **fields: str) -> float | None:
        engine = EngineConfig(**fields)  # type: ignore[arg-type]
        replicas = num_replicas or world_size
        return sent_bytes(BUCKETS, engine, world_size=world_size, num_replicas=replicas, num_statistics=10)

    assert per_step(1) == 0
    further = 2 * 4 * (2 + 3) + 2 * 24  # what is agreed on before the update, and whether to stop
    assert per_step(4) == 3 / 4 * (4 * 1152 + 1024 / 8 + 4 * 128 + further + 4 * 40)
    assert per_step(4, grad_comm_dtype="bf16") == 3 / 4 * (2 * 1152 + 1024 / 8 + 4 * 128 + further + 4 * 40)
    assert per_step(2, sharding="none") == 1 / 2 * (8 * 1152 + 48 + 80)
    assert per_step(2, sharding="zero1") == 1 / 2 * (12 * 1152 + 48 + 80)
    assert per_step(2, 4, sharding="zero2") == 1 / 2 * (20 * 1152 + 48 + 80)
    assert per_step(2, sharding="zero3") is None


def small(**fields: object) -> TrainConfig:
    config = dataclasses.replace(load_config("fashion_quickstart"), global_batch_size=256)
    return dataclasses.replace(config, **fields)  # type: ignore[arg-type]


def predicted(config: TrainConfig, world_size: int, num_replicas: int) -> Memory:
    model = create_model(config.model)
    plain, _ = build_optimizer(model, config.optim, num_steps=1)
    sharded = ShardedOptimizer(plain)  # of one rank: its buckets have the length of a few ranks' as well
    buckets = bucket_shapes(sharded, model_signature(model))
    return predict_memory(config, buckets, world_size=world_size, num_replicas=num_replicas)


def test_memory_by_hand() -> None:
    alone, two, many = (predicted(small(), *place) for place in ((1, 1), (2, 2), (2, 8)))
    numel = 294_912 + 13_760  # parameters and padding to 64
    assert alone.state == 8 * numel + 294_912 // 8
    assert two.state == alone.state // 2
    diagnosed = predicted(small(metrics=MetricsConfig(diagnostics=True)), 2, 2)
    assert diagnosed.state == two.state + 5 * 294_912 // 8 // 2
    assert alone.weights == two.weights
    assert 4 * numel < alone.weights < 4.05 * numel  # and the buffers of BatchNorm
    assert alone.gradients == 4 * numel
    assert two.gradients == 2 * alone.gradients  # what is sent and what is received, of both buckets
    assert alone.activations / two.activations == pytest.approx(2, rel=0.02)  # half of the micro-batch
    assert two.activations / many.activations == pytest.approx(4, rel=0.1)
    # After the third of four micro-batches two partial sums wait for the last one.
    assert many.gradients == 3 * 4 * numel
    for memory in (alone, two, many):
        assert memory.weights + memory.state + memory.activations < memory.peak
        assert memory.peak < memory.weights + memory.state + memory.gradients + 1.1 * memory.activations


def test_prediction_leaves_the_generator_alone() -> None:
    model = create_model(load_config("fashion_quickstart").model)
    plain, _ = build_optimizer(model, load_config("fashion_quickstart").optim, num_steps=1)
    before = torch.get_rng_state()
    predict_memory(small(), bucket_shapes(plain, model_signature(model)), world_size=1, num_replicas=1)
    assert torch.equal(before, torch.get_rng_state())


def test_plain_optimizers_are_counted_from_the_signature() -> None:
    config = load_config("fashion_quickstart")
    model = create_model(config.model)
    plain, _ = build_optimizer(model, config.optim, num_steps=1)
    shapes = bucket_shapes(plain, model_signature(model))
    assert [(bucket.numel, bucket.num_moments) for bucket in shapes] == [(294_912, 2), (13_738, 2)]


def test_difference_names_the_first_tensor() -> None:
    a = {"x": torch.ones(2), "y": torch.zeros(2)}
    assert difference(a, {name: tensor.clone() for name, tensor in a.items()}) is None
    assert difference(a, {"x": torch.ones(2)}) == "y is missing"
    assert difference(a, a | {"y": -torch.zeros(2)}) == "y differs"  # the sign of zero is a bit
    assert difference(a, a | {"x": torch.ones(3)}) == "x differs"


def test_words() -> None:
    assert [megabytes(value) for value in (20_000, 48_900_000, 1_203e6)] == ["0.02 MB", "48.9 MB", "1,203 MB"]
    assert clock(3723.4) == "1:02:03"
