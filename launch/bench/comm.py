"""What a rank sends: bitfleet's sharding, DeepSpeed's ZeRO and DistributedDataParallel train the same network in turns.

Two counts of the very same steps. From the calls: each collective as the bytes that the best algorithm for it has to send. On the
wire: what the network interfaces of the machine say they sent, headers and acknowledgements included.
"""

import gc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitfleet.models import QuantLinear, ste_sign
from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer, is_binary
from bitfleet.optim.sharding import reduction as sharding_exchange
from bitfleet.optim.sharding.optimizer import BUCKET_NUMEL
from bitfleet.trainer.engine.config import EngineConfig, deepspeed_options
from bitfleet.trainer.engine.engine import backward, create_engine
from bitfleet.trainer.ranks.collectives import Ranks, barrier, data_parallel, sum_over_ranks_

Method = Literal["bits", "none", "zero1", "zero2", "ddp"]
GradDtype = Literal["fp32", "bf16"]

TITLES: dict[Method, str] = {
    "bits": "bitfleet ShardedOptimizer",
    "none": "DeepSpeed ZeRO-0 (all-reduce)",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "ddp": "DistributedDataParallel",
}
METHODS: tuple[Method, ...] = get_args(Method)
GRAD_DTYPES: tuple[GradDtype, ...] = get_args(GradDtype)

DEPTH, WIDTH, NUM_CLASSES = 16, 256, 10


class Contender:
    """A network and one of the ways to train it on several ranks, as it is used in practice.

    The network is a stack of DEPTH binary layers of WIDTH^2 weights with a LayerNorm after each: no buffers (which
    DistributedDataParallel would send as well), and for a micro-batch of one sample hardly any activations.

    Args:
        method: how gradients are reduced, and state sharded.
        grad_dtype: what gradients travel as.
        ranks: this process's place.
        device: where it trains.
        bucket_numel: parameters in a bucket of every method; None is the default of each.
    """

    def __init__(
        self,
        method: Method,
        grad_dtype: GradDtype,
        ranks: Ranks,
        device: torch.device,
        bucket_numel: int | None = None,
    ) -> None:
        self.method = method
        torch.manual_seed(0)
        model = _network().to(device)
        self.num_binary = sum(param.numel() for param in model.parameters() if is_binary(param))
        self.numel = sum(param.numel() for param in model.parameters())
        self.images = torch.randn(1, WIDTH, device=device)
        self.labels = torch.zeros(1, dtype=torch.int64, device=device)
        self.optimizer, schedules = build_optimizer(model, OptimConfig(), num_steps=1000)
        self.engine: Any = None
        if method == "ddp":
            bucket_mib = 4 * bucket_numel / 2**20 if bucket_numel else None
            self.model = data_parallel(model, grad_dtype=grad_dtype, bucket_mib=bucket_mib)
            return
        options = deepspeed_options(
            EngineConfig(sharding=method),
            global_batch_size=ranks.world_size,
            num_replicas=ranks.world_size,
            world_size=ranks.world_size,
        )
        optimizer: Any = self.optimizer
        if method == "bits":
            dtype = torch.bfloat16 if grad_dtype == "bf16" else torch.float32
            optimizer = ShardedOptimizer(optimizer, grad_dtype=dtype, bucket_numel=bucket_numel or BUCKET_NUMEL)
        else:
            options["communication_data_type"] = grad_dtype
            if bucket_numel:
                sizes = {"reduce_bucket_size": bucket_numel, "allgather_bucket_size": bucket_numel}
                options["zero_optimization"] |= sizes
        self.optimizer = optimizer
        self.model = self.engine = create_engine(model, optimizer, schedules, options, device)

    def backward(self) -> None:
        """Forward and backward of a micro-batch, which is a whole batch of this rank."""
        loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        if self.method == "ddp":
            torch.autograd.backward(loss)
        else:
            backward(self.engine, loss, self.optimizer)

    def update(self) -> None:
        """What is left of the reduction, and the update; no gradient outlives it."""
        if self.method == "ddp":
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            self.engine.step()

    def close(self) -> None:
        """Let go of the engine, so that nothing of it is alive beside the next contender."""
        if self.engine is not None:
            self.engine.destroy()
        del self.model, self.engine, self.optimizer
        gc.collect()


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [QuantLinear(WIDTH, WIDTH, input_quantizer=ste_sign), nn.LayerNorm(WIDTH, bias=False)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, NUM_CLASSES))


SHARES = {
    "allreduce_": 2,  # a reduce-scatter and an all-gather
    "alltoall_base_": 1,
    "_allgather_base_": 1,
    "allgather_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_": 1,  # every rank but one sends all of it: on average as much as in a reduce-scatter
    "broadcast_": 1,
    "barrier": 0,
}
"""Collective of torch.distributed -> bytes that a rank must send, as a multiple of (N - 1) / N of the whole tensor."""


class CollectiveCounter(TorchDispatchMode):
    """Counts, while it is entered, what this rank's collectives have to send, whoever calls them.

    It sits below Python, where all of them end as operators of the library c10d: also those that DistributedDataParallel calls
    from C++. Only the swaps of bitfleet's reduction, which happen in a thread of their own, are counted where they are called.
    Every group is taken to hold all ranks.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self._called_bytes, self._swapped_bytes = 0.0, 0  # each written by one thread only

    @property
    def sent_bytes(self) -> float:
        """What has been counted so far."""
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
            # Of an all-gather the output is the whole tensor, of a reduce-scatter the input.
            whole = max(sum(tensor.nbytes for tensor in _tensors(argument)) for argument in args)
            self._called_bytes += SHARES[name] * (self.world_size - 1) / self.world_size * whole
        return func(*args, **(kwargs or {}))


def _tensors(argument: Any) -> Iterable[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)


def interface_bytes() -> dict[str, int]:
    """Bytes that each interface of this network namespace has sent since it exists.

    From /proc/net/dev: /sys/class/net has the same counters, but of the namespace in which /sys was mounted.
    """
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]  # without the titles
    fields = {name.strip(): values.split() for name, _, values in (line.partition(":") for line in lines)}
    return {name: int(values[8]) for name, values in fields.items()}


class Row(NamedTuple):
    """One contender; bytes are those that a rank sends in a step, on average over the ranks."""

    method: Method
    grad_dtype: GradDtype
    num_binary: int
    called_bytes: float
    wire_bytes: float
    """Over all interfaces of all machines."""
    between_bytes: float
    """The part of it that left a machine: over all interfaces but the loopback."""


def bench_comm(ranks: Ranks, device: torch.device, *, num_steps: int = 5) -> list[Row]:
    """Measure every contender, `num_steps` steps after two that do not count; every rank calls this.

    Raises:
        ValueError: there is a single rank.
    """
    if ranks.world_size < 2:
        raise ValueError(
            "one rank sends nothing: start it on several, as deepspeed --num_accelerators 2 --module bitfleet.launch bench comm"
        )
    return [_measure(method, grad_dtype, ranks, device, num_steps) for grad_dtype in GRAD_DTYPES for method in METHODS]


def _measure(method: Method, grad_dtype: GradDtype, ranks: Ranks, device: torch.device, num_steps: int) -> Row:
    contender = Contender(method, grad_dtype, ranks, device)
    for _ in range(2):  # the first one allocates state
        contender.backward()
        contender.update()
    before = read_interfaces(ranks)
    with CollectiveCounter(ranks.world_size) as counter:
        for _ in range(num_steps):
            contender.backward()
            contender.update()
    after = read_interfaces(ranks)
    num_binary = contender.num_binary
    contender.close()
    totals = torch.tensor(
        [counter.sent_bytes, *(b - a for a, b in zip(before, after, strict=True))], dtype=torch.float64
    )
    means = sum_over_ranks_(totals.to(device)) / (num_steps * ranks.world_size)
    return Row(method, grad_dtype, num_binary, *means.tolist())


def read_interfaces(ranks: Ranks) -> tuple[int, int]:
    """(all, without the loopback) bytes sent by this machine, read between two barriers; one rank of a machine reads."""
    barrier()
    sent = interface_bytes() if ranks.local_rank == 0 else {}
    barrier()
    return sum(sent.values()), sum(value for name, value in sent.items() if name != "lo")


def format_comm(rows: Sequence[Row], ranks: Ranks) -> str:
    """The rows as a table for a terminal."""
    num_hosts = ranks.world_size // ranks.local_world_size
    lines = [
        f"bytes sent by a rank per step, {ranks.world_size} ranks on {num_hosts} host{'s' * (num_hosts > 1)}, "
        f"{rows[0].num_binary:,} binary weights",
        f"  {'':30}{'gradients':10}{'bytes':>12}{'per binary weight':>20}{'on the wire':>13}{'between hosts':>15}",
    ]
    lines += [
        f"  {TITLES[row.method]:30}{row.grad_dtype:10}{row.called_bytes:12,.0f}{row.called_bytes / row.num_binary:20.3f}"
        f"{row.wire_bytes / row.num_binary:13.3f}{row.between_bytes / row.num_binary:15.3f}"
        for row in rows
    ]
    return "\n".join(lines)
