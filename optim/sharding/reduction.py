"""Reduce gradients over the ranks: out of backward, bucket by bucket, into the slice of each rank.

A bucket is summed in one fixed tree over the ranks, in one of two ways. Both send (N - 1) / N of
the bucket from each rank, and in fp32 give the bits of `tree_sum` over the ranks:

- Halving, for a power of two of ranks: with the neighbour rank ^ 1 each rank swaps one half of the
  bucket against the other and adds; then with rank ^ 2 half of what is left; and so on (recursive
  halving: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
  MPICH", 2005). Ranks of a node are neighbours, so the large messages stay inside of it: with G
  ranks on each of n nodes a node sends (n - 1) / n of one bucket to others, an all-to-all G times
  as much. In bf16 what is swapped is rounded, what a rank keeps is not, and sums are fp32: log2(N)
  roundings lie on the way of half of the gradients.
- All-to-all, for any other number of ranks: every gradient is rounded once in bf16.
"""

import functools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from bitfleet.optim.sharding.buckets import Bucket, tree_sum

MAX_FLIGHTS = 2
"""Largest number of reductions in progress on a CPU: one on the wire, one waiting for it. More
would only hold more memory. A GPU has no limit: there the host is far ahead, and a wait for the
first exchange would hold up the rest of backward (4 bytes per weight until the step)."""


all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gather one tensor of each rank into one of all: torch's function of this name, or what it is
called before torch 2.13, of which torch 2.14 warns."""

Exchange = Callable[[Tensor, Tensor], Tensor]
"""(a bucket's gradients of this rank, fp32 [N * slice], room for as many of what travels) -> their
sum over the ranks, of this rank's slice, fp32 [slice]."""


_Order = tuple[Exchange, Tensor, Tensor, "Future[Tensor]"]


class Flight(Protocol):
    """Reduction that is in progress or done; a `concurrent.futures.Future` is one."""

    def done(self) -> bool:
        """Return True if `result` returns at once."""

    def result(self) -> Tensor:
        """Wait for this rank's slice of what the ranks have exchanged, fp32 [slice]."""


def can_halve(world_size: int) -> bool:
    """Return True if gradients are reduced by halving, else by all-to-all."""
    return world_size & (world_size - 1) == 0


def halving_sum(
    total: Tensor, scratch: Tensor, *, rank: int, world_size: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Reduce-scatter by recursive halving; every rank calls this for the same buckets in the same
    order.

    Args:
        total: this rank's gradients, fp32 [world_size * slice]; written over.
        scratch: fp32 or bf16, which is what travels, of the same shape; written over.
        rank: this rank within `group`.
        world_size: a power of two.
        group: the ranks.

    Returns:
        The sum over the ranks of slice `rank`, fp32 [slice], a view into `total`.
    """
    part, distance = total.view(world_size, -1), 1
    while distance < world_size:
        pairs = part.view(len(part) // 2, 2, part.shape[1])  # slices of ranks whose bit at `distance` is 0 and 1
        mine = rank // distance % 2
        send, received = scratch[: part.numel()].view(2, *pairs[:, 0].shape)
        send.copy_(pairs[:, 1 - mine])
        swap(send, received, rank ^ distance, group)
        part = pairs[:, mine].add_(received)
        distance *= 2
    return part.view(-1)


def swap(send: Tensor, received: Tensor, peer: int, group: dist.ProcessGroup | None) -> None:
    """Send `send` to rank `peer` of `group` and receive `received` from it at the same time."""
    # The receive first: with the send first gloo moves one direction after the other, at half the
    # rate. As bytes, because gloo has no bfloat16.
    messages = [
        dist.P2POp(dist.irecv, received.view(torch.uint8), group=group, group_peer=peer),
        dist.P2POp(dist.isend, send.view(torch.uint8), group=group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()


class AllToAll:
    """Reduction by all-to-all, which is summed when it has arrived.

    Args:
        total: this rank's gradients, fp32 [world_size * slice].
        world_size: the number of ranks.
        group: the ranks.
        grad_dtype: what they travel as; sums are fp32.
        finish: makes the result of the sum over the ranks.
    """

    def __init__(
        self,
        total: Tensor,
        *,
        world_size: int,
        group: dist.ProcessGroup | None,
        grad_dtype: torch.dtype,
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        self._world_size, self._finish = world_size, finish
        self._send = total.to(grad_dtype)  # lives until it has landed
        self._received = torch.empty_like(self._send)
        # As bytes, because gloo has no bfloat16.
        self._work = dist.all_to_all_single(
            self._received.view(torch.uint8), self._send.view(torch.uint8), group=group, async_op=True
        )

    def done(self) -> bool:
        """Return True once everything has arrived."""
        return self._work is None or bool(self._work.is_completed())

    def result(self) -> Tensor:
        """Wait for the parts, sum them and finish the sum."""
        if self._work is not None:
            self._work.wait()
        return self._finish(tree_sum([part.float() for part in self._received.view(self._world_size, -1)]))


class Courier:
    """Runs exchanges one after another while backward continues: in a thread on a CPU, on a
    separate stream on a GPU.

    The thread is a daemon: one that waits for a lost rank must not keep a failed process alive.

    Args:
        device: where the gradients are.
        grad_dtype: what they travel as.
    """

    def __init__(self, device: torch.device, grad_dtype: torch.dtype) -> None:
        self._grad_dtype = grad_dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, exchange: Exchange, total: Tensor) -> Flight:
        """Start `exchange` of `total`, after all that were started before; `total` now belongs to
        it."""
        scratch = torch.empty_like(total, dtype=self._grad_dtype)  # here, where memory counters see it
        if self._stream is not None:
            return _Streamed(exchange, total, scratch, self._stream)
        if self._thread is None:
            arguments = (self._orders, torch.get_num_threads())
            self._thread = threading.Thread(target=_carry, args=arguments, name="bitfleet-courier", daemon=True)
            self._thread.start()
        landing: Future[Tensor] = Future()
        self._orders.put((exchange, total, scratch, landing))
        return landing

    def close(self) -> None:
        """End the thread, after what was started."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread = None


@torch.no_grad()
def _carry(orders: "queue.SimpleQueue[_Order | None]", num_threads: int) -> None:
    torch.set_num_threads(num_threads)  # OpenMP keeps a number per thread
    while (order := orders.get()) is not None:
        exchange, total, scratch, landing = order
        del order
        try:
            result = exchange(total, scratch)
        except BaseException as error:  # raised again by `result`
            landing.set_exception(error)
        else:
            landing.set_result(result)
            del result
        del exchange, total, scratch, landing  # not until the next order comes


class _Streamed:
    """Exchange on a stream: everything is enqueued at once, and only the streams wait."""

    def __init__(self, exchange: Exchange, total: Tensor, scratch: Tensor, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            total.record_stream(stream)
            scratch.record_stream(stream)
            self._sum = exchange(total, scratch)
            self._landed = stream.record_event()

    def done(self) -> bool:
        return bool(self._landed.query())

    def result(self) -> Tensor:
        torch.cuda.current_stream(self._sum.device).wait_event(self._landed)
        return self._sum


class Reduction:
    """Point 2 of the protocol of `ShardedOptimizer`: hooks on the parameters, one exchange a
    bucket, sums in a tree.

    Args:
        buckets: all of them, in the order in which they are sent.
        process_group: the ranks.
        rank: this one's number among them.
        world_size: their number.
        num_replicas: backward passes of a step over all ranks.
        grad_dtype: what gradients travel as.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        process_group: dist.ProcessGroup | None,
        *,
        rank: int,
        world_size: int,
        num_replicas: int,
        grad_dtype: torch.dtype,
    ) -> None:
        self.buckets, self.process_group, self.world_size = buckets, process_group, world_size
        self.num_replicas, self.grad_dtype = num_replicas, grad_dtype
        self._courier = Courier(buckets[0].weights.device, grad_dtype)
        self._on_gpu = buckets[0].weights.is_cuda
        self._halving = functools.partial(halving_sum, rank=rank, world_size=world_size, group=process_group)
        self._flights: dict[int, Flight] = {}
        self._reduced: dict[int, Tensor] = {}
        self._replicas_done = self._next = 0
        self._in_backward = False
        self._arrived: set[tuple[int, int]] = set()
        self._hooks = [
            segment.param.register_post_accumulate_grad_hook(self._hook(number, index))
            for number, bucket in enumerate(buckets)
            for index, segment in enumerate(bucket.segments)
            if segment.param.requires_grad
        ]

    def _hook(self, number: int, index: int) -> Callable[[Tensor], None]:
        bucket = self.buckets[number]

        def on_gradient(_: Tensor) -> None:
            if not self._in_backward:
                self._in_backward = True
                # As DistributedDataParallel does: the end of this backward, whichever parameters it
                # reaches.
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            if (number, index) in self._arrived:  # the first part of it may be on its way already
                raise ValueError(
                    f"{bucket.segments[index].name} got two gradients in one backward pass, as under activation "
                    "checkpointing with use_reentrant=True: use use_reentrant=False"
                )
            self._arrived.add((number, index))
            bucket.add_gradient(index)
            if self._is_last_replica:
                self._launch()

        return on_gradient

    @property
    def _is_last_replica(self) -> bool:
        return self._replicas_done == self.num_replicas // self.world_size - 1

    def _end_backward(self) -> None:
        self._in_backward = False
        self._arrived.clear()
        if self._is_last_replica:
            self._launch(everything=True)
        else:
            for bucket in self.buckets:
                bucket.end_replica()
        self._replicas_done += 1

    @torch.no_grad()
    def _launch(self, everything: bool = False) -> None:
        """Send the next buckets in order, up to the first one that is not complete."""
        while self._next < len(self.buckets) and (everything or self.buckets[self._next].is_complete):
            while len(self._flights) >= MAX_FLIGHTS and not self._on_gpu:
                self._land(next(iter(self._flights)))
            self._send(self._next)
            self._next += 1
        if self._on_gpu:
            return
        for index, flight in list(self._flights.items()):
            if flight.done():
                self._land(index)

    def _send(self, index: int) -> None:
        bucket = self.buckets[index]
        bucket.end_replica()
        total = bucket.take_gradient()
        if self.world_size == 1:
            self._reduced[index] = self._mean(total)
        elif can_halve(self.world_size):
            self._flights[index] = self._courier.send(self._mean_of_halves, total)
        else:
            self._flights[index] = AllToAll(
                total,
                world_size=self.world_size,
                group=self.process_group,
                grad_dtype=self.grad_dtype,
                finish=self._mean,
            )

    def _land(self, index: int) -> None:
        """Wait for the mean of bucket `index` over the replicas."""
        self._reduced[index] = self._flights.pop(index).result()

    def _mean_of_halves(self, total: Tensor, scratch: Tensor) -> Tensor:
        return self._mean(self._halving(total, scratch))

    def _mean(self, total: Tensor) -> Tensor:
        # A new tensor: the sum may be a view into a buffer of the whole bucket, which is freed now.
        return total if self.num_replicas == 1 else total / self.num_replicas

    def check_complete(self) -> None:
        """Raise ValueError unless this rank has made all its backward passes of a step."""
        expected, done = self.num_replicas // self.world_size, self._replicas_done
        if done == 0:
            raise ValueError(
                f"step() after 0 of {expected} backward passes of this rank: none has reached the parameters that the "
                "optimizer was built with (load_state_dict(assign=True) replaces them: build it afterwards)"
            )
        if done != expected:
            raise ValueError(
                f"step() after {done} of {expected} backward passes of this rank: expected {expected} "
                "(num_replicas / ranks) since the last step() or zero_grad()"
            )

    def take(self) -> list[Tensor]:
        """Wait for all reductions; return the reduced slice of every bucket, fp32, which now
        belongs to the caller."""
        for index in list(self._flights):
            self._land(index)
        self._replicas_done = self._next = 0
        return [self._reduced.pop(index) for index in range(len(self.buckets))]

    def forget(self) -> None:
        """Drop the gradients of a step that was started.

        Raises:
            ValueError: some of them have left for other ranks already.
        """
        if self.world_size > 1 and (self._flights or self._reduced):
            raise ValueError(
                "zero_grad() between backward and step(): gradients are under way to the other ranks: make the step, "
                "or start again from a checkpoint"
            )
        self._in_backward, self._replicas_done, self._next = False, 0, 0
        self._arrived.clear()
        self._reduced.clear()
        for bucket in self.buckets:
            bucket.forget_gradients()

    def close(self) -> None:
        """Remove the hooks of the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._courier.close()
