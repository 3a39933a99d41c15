"""Count what a rank sends and holds under bitfleet's sharding, ZeRO and DistributedDataParallel.

Two counts of the same steps. From the calls: each collective as the bytes that the best algorithm
for it has to send. On the wire: what the network interfaces of the machines say they sent, headers
and acknowledgements included.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, get_args

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitfleet.launch.bench.command import Comm, Memory, Sharding
from bitfleet.launch.bench.results import Row, titled
from bitfleet.launch.bench.step import compiled_rule
from bitfleet.launch.bench.timing import interleave, ratio, take_turn
from bitfleet.launch.bench.training import GradDtype, Method, TrainingStep
from bitfleet.launch.preflight.tensor_bytes import TensorBytes
from bitfleet.models import ModelConfig, QuantLinear, create_model, ste_sign
from bitfleet.optim.rules.rule import Group, Rule, State, register
from bitfleet.optim.sharding import reduction as sharding_exchange
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_numbers, barrier

TITLES: dict[Method, str] = {
    "bits": "bitfleet ShardedOptimizer",
    "none": "DeepSpeed ZeRO-0 (all-reduce)",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "ddp": "DistributedDataParallel",
}
GRAD_DTYPES: tuple[GradDtype, ...] = get_args(GradDtype)
DEPTH, WIDTH, NUM_CLASSES = 16, 256, 10
NUM_BINARY = DEPTH * WIDTH**2
NUM_BUCKETS = 8
SETTLE_SECONDS = 0.05
"""Time for gloo's threads, which need the interpreter, to release the last tensors."""
NETWORKS = {"birealnet18": 64, "xnornet": 224}
"""Network -> pixels of a side."""
COMPILED = "bop2ndorder_compiled"


def binary_stack() -> nn.Sequential:
    """Create DEPTH binary layers of WIDTH^2 weights, without buffers, which DDP would send."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [QuantLinear(WIDTH, WIDTH, input_quantizer=ste_sign), nn.LayerNorm(WIDTH, bias=False)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, NUM_CLASSES))


SHARES = {
    "allreduce_": 2,  # a reduce-scatter and an all-gather
    **dict.fromkeys(("alltoall_base_", "_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"), 1),
    **dict.fromkeys(("_reduce_scatter_base_", "reduce_scatter_", "broadcast_"), 1),
    "reduce_": 1,  # every rank but one sends all of it: on average as much as in a reduce-scatter
    "barrier": 0,
}
"""Collective -> bytes that a rank must send, as a multiple of (N - 1) / N of the tensor."""


class CollectiveCounter(TorchDispatchMode):
    """Count the bytes that this rank's collectives have to send, whatever calls them.

    It sits below Python, where all of them end as operators of the library c10d, also those that
    DistributedDataParallel calls from C++. Only the swaps of bitfleet's reduction, which happen in
    their own thread, are counted where they are called. Every group is taken to hold all ranks.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self._called_bytes, self._swapped_bytes = 0.0, 0  # each written by one thread only

    @property
    def sent_bytes(self) -> float:
        """Bytes counted so far."""
        return self._called_bytes + self._swapped_bytes

    def __enter__(self) -> Self:
        self._swap = sharding_exchange.swap
        sharding_exchange.swap = self._counted_swap
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        sharding_exchange.swap = self._swap
        super().__exit__(*exception)

    def _counted_swap(self, send: Tensor, received: Tensor, peer: int, group: Any) -> None:
        self._swapped_bytes += send.nbytes
        self._swap(send, received, peer, group)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator `func`, and count it if it is a collective."""
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            assert name in SHARES, f"no rule for the collective {name}"
            # The full tensor is the output of an all-gather, and the input of a reduce-scatter.
            tensors = ([leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args)
            largest = max(sum(tensor.nbytes for tensor in each) for each in tensors)
            self._called_bytes += SHARES[name] * (self.world_size - 1) / self.world_size * largest
        return func(*args, **(kwargs or {}))


def wire_bytes(ranks: Ranks) -> Tensor:
    """Return the bytes that the interfaces of this network namespace have sent, on its first rank.

    Returns:
        fp64 [2]: of all interfaces, and of all but the loopback.
    """
    barrier()
    counters = psutil.net_io_counters(pernic=True, nowrap=False) if ranks.local_rank == 0 else {}
    sent = {name: counter.bytes_sent for name, counter in counters.items()}
    barrier()
    return torch.tensor([sum(sent.values()), sum(sent.values()) - sent.get("lo", 0)], dtype=torch.float64)


def _hosts(ranks: Ranks) -> str:
    num_hosts = ranks.world_size // ranks.local_world_size
    return f"{num_hosts} host{'s' * (num_hosts > 1)}"


def _method_rows(measure: Callable[[Method, GradDtype], Sequence[float]], *names: str) -> list[Row]:
    """Measure every method with every dtype of gradients."""
    return [
        {"what": f"{title}, {grad_dtype}", **dict(zip(names, measure(method, grad_dtype), strict=True))}
        for grad_dtype in GRAD_DTYPES
        for method, title in TITLES.items()
    ]


def bench_comm(options: Comm, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Count the bytes of every method, after two steps that do not count.

    Raises:
        ValueError: there is a single rank.
    """
    if ranks.world_size < 2:
        raise ValueError(
            "one rank sends nothing: start several, deepspeed --num_accelerators 2 --module bitfleet.launch bench comm"
        )

    def measure(method: Method, grad_dtype: GradDtype) -> list[float]:
        images = torch.randn(1, WIDTH, device=device)
        step = TrainingStep(method, binary_stack(), images, ranks.world_size, grad_dtype=grad_dtype)
        for _ in range(2):  # the first one allocates state
            step()
        before = wire_bytes(ranks)
        with CollectiveCounter(ranks.world_size) as counter:
            for _ in range(options.steps):
                step()
        sent = [counter.sent_bytes, *(wire_bytes(ranks) - before).tolist()]
        step.close()
        return [sum(all_gather_numbers(number)) / (options.steps * ranks.world_size * NUM_BINARY) for number in sent]

    yield titled(
        f"bytes that a rank sends per step and binary weight, {ranks.world_size} ranks on {_hosts(ranks)}, "
        f"{NUM_BINARY:,} binary weights",
        _method_rows(measure, "calls", "on the wire", "between hosts"),
    )


def bench_memory(options: Memory, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Count bytes per parameter on the rank that has most, after two steps of warm-up."""
    images, bucket_numel = torch.randn(1, WIDTH, device=device), DEPTH // NUM_BUCKETS * WIDTH**2

    def measure(method: Method, grad_dtype: GradDtype) -> list[float]:
        samples = []
        with TensorBytes() as count:
            sizes: Any = {"world_size": ranks.world_size, "bucket_numel": bucket_numel}
            step = TrainingStep(method, binary_stack(), images, grad_dtype=grad_dtype, **sizes)
            numel = sum(param.numel() for param in step.model.parameters())
            for _ in range(2 + options.steps):  # the first one allocates the state
                count.take_peak()
                step()
                peak = count.take_peak()
                barrier()
                time.sleep(SETTLE_SECONDS)
                samples.append((count.live, peak))
        step.close()
        after, peaks = zip(*samples[2:], strict=True)
        # Bytes held between steps are there after every step; more than the least of them is about
        # to be freed.
        return [max(all_gather_numbers(num_bytes)) / numel for num_bytes in (min(after), max(peaks))]

    yield titled(
        f"bytes of tensors per parameter on a rank, {ranks.world_size} ranks; a bucket of fp32 gradients is "
        f"{4 / NUM_BUCKETS:g}",
        _method_rows(measure, "after the step", "peak"),
    )


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    rates = {key: torch.tensor(float(group[key])) for key in ("gamma", "sigma", "threshold")}
    moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    compiled_rule()(weight.view(-1), grad.reshape(-1), *moments, **rates)


register(Rule(name=COMPILED, update_=_update_, state_keys=("exp_avg", "exp_avg_sq")))


def bench_sharding(options: Sharding, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Time steps and count bytes in turns; for fp32 weights the rule is compiled."""
    for network in [options.network] if options.network else NETWORKS:
        size = NETWORKS[network]
        images = torch.randn(options.micro_batch_size, 3, size, size, device=device)
        images = images.to(memory_format=torch.channels_last)
        steps: dict[Method, TrainingStep] = {}
        for method in options.contender:
            torch.manual_seed(0)
            model = create_model(ModelConfig(name=network))
            steps[method] = TrainingStep(method, model, images, ranks.world_size, rule=COMPILED)

        def measure(step: TrainingStep) -> tuple[float, float]:
            """Return seconds and bytes per step, bytes of the interfaces of all machines divided by
            the ranks."""
            before = wire_bytes(ranks)
            turn = take_turn(step, options.steps, device)
            sent = float((wire_bytes(ranks) - before)[0])
            return turn.seconds, sum(all_gather_numbers(sent)) / ranks.world_size / options.steps

        turns = interleave({method: functools.partial(measure, step) for method, step in steps.items()}, options.rounds)
        for step in steps.values():
            step.close()
        yield titled(
            f"{network}, {size} px, {ranks.world_size} ranks x {options.micro_batch_size} images on {_hosts(ranks)}, "
            f"per step, median of {options.rounds} rounds",
            _sharding_rows(turns),
        )


def _sharding_rows(turns: dict[Method, list[tuple[float, float]]]) -> list[Row]:
    """Return a row per contender, with the ratios of the first one to it."""
    first_seconds, first_sent = zip(*next(iter(turns.values())), strict=True)
    rows = []
    for method, values in turns.items():
        seconds, sent = zip(*values, strict=True)
        figures = {"ms": 1e3 * statistics.median(seconds), "MB sent": statistics.median(sent) / 1e6}
        bytes_ratio = ratio(first_sent, [max(num_bytes, 1.0) for num_bytes in sent])
        ratios = {"first / it: time": ratio(first_seconds, seconds), "bytes": bytes_ratio}
        rows.append({"what": TITLES[method], **figures, **ratios})
    return rows
