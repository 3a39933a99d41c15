"""Kernels of a step: by hand for small networks, for any batch, on real tensors, and against the
scheduler of torch.compile."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.configs import load_config
from bitfleet.launch.plan.launches import (
    FINITE,
    UNDO,
    Count,
    LaunchCounter,
    Passes,
    autocast_on_meta,
    count_launches,
    count_passes,
    kernels_of,
    rule_launches,
)
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, RoutedOptimizer, binary_rules, build_optimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.engine.config import EngineConfig

SMALL = load_config("fashion_quickstart")


def images(num_images: int, size: int, device: str = "meta") -> Tensor:
    return torch.zeros(num_images, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)


def count(
    model: nn.Module, batch: Tensor, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> tuple[Count, Count]:
    """Kernels of forward and of backward, after a pass that makes tables that are kept."""
    counter = LaunchCounter(batch.device.type)
    for _ in range(2):
        with counter:
            counter.take()
            with context():
                output = model(batch)
            forward = counter.take()
            seed = torch.ones_like(output)
            counter.take()
            torch.autograd.backward(output, seed)
            backward = counter.take()
        model.zero_grad()
    return forward, backward


def test_a_small_network_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.MaxPool2d(2), nn.ReLU())
    forward, backward = count(model.to("meta"), images(2, 8))
    # The 3x3 weight into channels_last, convolution, bias; ReLU; convolution (a 1x1 weight is in
    # both layouts); pool; ReLU.
    assert forward.eager == 3 + 1 + 1 + 1 + 1
    # Compiled: the same calls of cuDNN, a ReLU between them, and pool and ReLU as one kernel.
    assert forward.compiled == 3 + 1 + 1 + 1
    # ReLU, zeros and pool, two gradients, ReLU; then the gradients of the first weight, into its
    # layout, and of the bias.
    assert backward.eager == 1 + 2 + 2 + 1 + 3
    # A ReLU, a pool, two gradients, a ReLU, and the first convolution as before.
    assert backward.compiled == 1 + 1 + 2 + 1 + 3


def test_batch_norm_is_one_kernel_of_cudnn_or_three_of_torch() -> None:
    for affine, forward, backward in ((True, 1, 1), (False, 3, 2)):
        model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, affine=affine)).to("meta")
        found = count(model, images(2, 8))
        assert found[0].eager == 1 + forward + 1  # and its counter of batches
        assert found[1].eager == backward + 1
        # Statistics in two stages, result, counter; and backward the same without a counter.
        assert (found[0].compiled, found[1].compiled) == (1 + 2 + 1 + 1, 2 + 1 + 1)
    assert kernels_of("native_batch_norm", [None, torch.ones(4)]) == 1


def test_views_and_numbers_on_the_cpu_launch_nothing() -> None:
    counter = LaunchCounter()
    x = torch.zeros(4, 8, device="meta")
    with counter:
        x.view(8, 4).t().unsqueeze(0).expand(3, 4, 8)[1:].detach()
        torch.empty_like(x)
        torch.tensor(1.0) + 1
        assert counter.take() == (0, 0)
        torch._foreach_add_([x, x], 1.0)
        x.add_(torch.tensor(2.0)).copy_(x.clone())
        assert counter.take() == (4, 2)  # a copy fuses with nothing
        assert counter.take() == (0, 0)


@pytest.mark.parametrize("name", ["birealnet18", "xnornet"])
def test_no_count_depends_on_the_batch(name: str) -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(name=name))
    assert count(model, images(2, 224)) == count(model, images(256, 224))


@pytest.mark.parametrize(
    ("name", "precision"), [("birealnet_small", "fp32"), ("birealnet_small", "bf16"), ("binarynet", "fp32")]
)
def test_tensors_without_memory_run_the_operators_of_real_ones(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bitfleet.models.layers.layers.can_pack", lambda *_: False
    )  # a CPU's kernels on bits are not operators
    model = create_model(ModelConfig(name=name, num_classes=10))

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    real = count(model, images(2, 32, "cpu"), autocast)
    assert count(model.to("meta"), images(2, 32), lambda: autocast_on_meta(precision)) == real


def passes_of(config: TrainConfig) -> Passes:
    return count_passes(create_model(config.model).to("meta"), config)


def test_the_passes_of_a_configuration() -> None:
    fp32 = passes_of(SMALL)
    network = count(create_model(SMALL.model).to("meta"), images(2, 32))
    # Three for the normalisation of uint8 images, two for the loss, neither of them compiled;
    # backward two and one for the loss, and its seed.
    assert fp32.forward == Count(network[0].eager + 5, network[0].compiled + 5)
    assert fp32.backward.eager == network[1].eager + 4
    assert fp32.forward.compiled < fp32.forward.eager
    assert fp32.num_counters == 9
    lowered = passes_of(dataclasses.replace(SMALL, engine=EngineConfig(precision="bf16")))
    assert lowered.forward.eager > fp32.forward.eager
    assert lowered.metrics == fp32.metrics


class Two(nn.Module):
    """A binary matrix of 8 x 8 and a real one, which the rules of Bop and of Adam update."""

    def __init__(self) -> None:
        super().__init__()
        self.binary, self.real = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
        self.binary.binary = True  # type: ignore[attr-defined]


def optimizer_of(rule: str) -> RoutedOptimizer:
    with torch.device("meta"):
        return build_optimizer(Two(), OptimConfig(rule=rule), num_steps=100)[0]


PASSES = Passes(Count(10, 5), Count(20, 8), metrics=7, num_counters=3)
ADAM = 9
"""lerp_, mul_, addcmul_, sqrt, div, add_, mul, div_ and sub_."""


@pytest.mark.parametrize(
    ("num_replicas", "world_size", "own", "means", "exchange"),
    [
        (1, 1, 0, 0, 0),
        # Two buckets: a sum and a division each. Means of the statistics: a sum, a division, a
        # copy, three counters.
        (2, 1, 4, 6, 0),
        # Divisions; the others' statistics and their sum. A round of three kernels for each bucket,
        # then signs, and values behind a copy; and what is agreed on.
        (2, 2, 2, 4, 2 * 3 + 1 + 2 + 1),
        (4, 2, 4, 8, 2 * 3 + 1 + 2 + 1),
        (8, 8, 2, 10, 2 * 9 + 1 + 2 + 1),
        (3, 3, 2, 5, 2 * (1 + 2) + 1 + 2 + 1),
    ],
)
def test_launches_of_a_step_by_hand(num_replicas: int, world_size: int, own: int, means: int, exchange: int) -> None:
    optimizer = optimizer_of("bop")
    config = dataclasses.replace(SMALL, num_replicas=num_replicas, global_batch_size=24)
    found = count_launches(PASSES, optimizer.param_groups, config, world_size, compiled=False)
    # Zeros for each bucket, a copy of each gradient, two copies of statistics.
    assert (found.forward, found.backward, found.rest) == (10, 20, 2 + 2 + 2 + 7)
    # Each bucket's sum for the check; one kernel flips, one unpacks.
    assert found.update == FINITE + 2 * 2 + 1 + 1 + ADAM + 3 * UNDO + own + means
    assert found.exchange == exchange
    assert found.num_micro_batches == num_replicas // world_size
    assert found.micro_batch == 43
    assert found.step == found.num_micro_batches * 43 + found.update + exchange
    compiled = count_launches(PASSES, optimizer.param_groups, config, world_size, compiled=True)
    assert compiled == found._replace(forward=5, backward=8)


def test_launches_of_other_engines() -> None:
    optimizer = optimizer_of("bop")

    def found(engine: EngineConfig, world_size: int) -> tuple[int, int]:
        config = dataclasses.replace(SMALL, num_replicas=3, engine=engine, global_batch_size=24)
        launches = count_launches(PASSES, optimizer.param_groups, config, world_size, compiled=False)
        return launches.update, launches.exchange

    (update, exchange), (rounded, rounded_exchange) = (
        found(EngineConfig(grad_comm_dtype=d), 3) for d in ("fp32", "bf16")
    )
    assert (rounded, rounded_exchange) == (update, exchange + 2)  # a conversion for each bucket
    assert found(EngineConfig(max_grad_norm=1.0), 3)[0] == update + 4  # of the real bucket
    bop = rule_launches(optimizer.param_groups[0])
    assert found(EngineConfig(sharding="none"), 1) == (
        bop + ADAM + 7,
        0,
    )  # 7: the means of three micro-batches' statistics
    assert found(EngineConfig(sharding="none"), 3) == (bop + ADAM + 5, 2 + 3)
    assert found(EngineConfig(sharding="zero1"), 3) == (2 * 2 + bop + ADAM + 4 + 5, 4)


@pytest.mark.parametrize("rule", binary_rules())
def test_every_rule_is_counted(rule: str) -> None:
    optimizer = optimizer_of(rule)
    binary, real = (rule_launches(group) for group in optimizer.param_groups)
    assert 5 <= binary <= 30
    assert real == ADAM


def scheduled_kernels(model: nn.Module, batch: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels that torch.compile plans for a GPU: its code for Triton is generated, but neither
    compiled nor run."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import compile_fx, config, graph, metrics

    library: list[int] = []

    def generate(lowering: Any) -> None:
        lowering.codegen()
        targets = [str(node.target) for node in lowering.graph.nodes]
        library.append(
            sum(2 if "convolution_backward" in target else "convolution" in target for target in targets)
            + sum(".mm." in target or ".addmm." in target for target in targets)
        )
        raise RuntimeError("planned")

    def plan(module: Any, inputs: Any, **options: Any) -> Any:
        with pytest.raises(Exception, match="planned"):
            compile_fx.compile_fx_inner(module, inputs, **options)
        return make_boxed_func(module.forward)

    def backend(module: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(module, inputs, inner_compile=plan)

    monkeypatch.setattr(torch.utils._triton, "triton_hash_with_backend", lambda: "")  # asks for a GPU
    monkeypatch.setattr(graph.GraphLowering, "compile_to_module", generate)
    metrics.reset()
    torch._dynamo.reset()
    with config.patch(cpu_backend="triton"):
        output = torch.compile(model, fullgraph=True, backend=backend)(batch)
        torch.autograd.backward(output.sum())
    assert len(library) == 2  # forward and backward
    return metrics.generated_kernel_count + sum(library)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("birealnet_small", {"depths": (2,)}, 32),
        pytest.param("birealnet_small", {}, 32, marks=pytest.mark.slow),
        pytest.param("binarynet", {}, 32, marks=pytest.mark.slow),
        pytest.param("birealnet18", {}, 64, marks=pytest.mark.slow),
        pytest.param("xnornet", {}, 224, marks=pytest.mark.slow),
    ],
)
def test_the_compiled_count_is_near_what_torch_compile_plans(
    name: str, options: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model(ModelConfig(name=name, num_classes=10, **options))
    monkeypatch.setattr("bitfleet.models.layers.layers.can_pack", lambda *_: False)  # as on a GPU
    planned = scheduled_kernels(model, images(4, size, "cpu"), monkeypatch)
    forward, backward = count(model.to("meta"), images(4, size))
    assert 0.7 * planned < forward.compiled + backward.compiled < 1.3 * planned
