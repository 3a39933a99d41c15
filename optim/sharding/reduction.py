"""Gradients of a sharded optimizer on their way: out of backward, over the ranks, into each rank's slice."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bitfleet.optim.sharding.buckets import Bucket
from bitfleet.optim.sharding.exchange import AllToAll, Courier, Flight, can_halve, halving_sum

MAX_FLIGHTS = 2
"""Reductions under way at a time on a CPU: one on the wire, one waiting for it. More would only hold more memory. A GPU has no
limit: there the host is far ahead, and a wait for the first exchange would hold up the rest of backward (4 bytes per weight until
the step)."""


class Reduction:
    """Point 2 of the protocol of `ShardedOptimizer`: hooks on the parameters, one exchange a bucket, sums in a tree.

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
                # As DistributedDataParallel does: the end of this backward, whichever parameters it reaches.
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            if (number, index) in self._arrived:  # the first part of it may be on its way already
                raise ValueError(
                    f"{bucket.segments[index].name} got two gradients in one backward pass, as under activation checkpointing "
                    f"with use_reentrant=True: use use_reentrant=False"
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
        """Send the next buckets in order, as far as they are complete."""
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
        local_replicas = self.num_replicas // self.world_size
        if self._replicas_done != local_replicas:
            raise ValueError(f"step() after {self._replicas_done} of {local_replicas} backward passes of this rank")

    def take(self) -> list[Tensor]:
        """Wait for what is under way; the reduced slice of every bucket, fp32, which now belongs to the caller."""
        for index in list(self._flights):
            self._land(index)
        self._replicas_done = self._next = 0
        return [self._reduced.pop(index) for index in range(len(self.buckets))]

    def forget(self) -> None:
        """Drop the gradients of a step that was begun.

        Raises:
            ValueError: some of them have left for other ranks already.
        """
        if self._flights or self._reduced:
            raise ValueError("zero_grad() between backward and step(): gradients are under way to the other ranks")
        self._in_backward, self._replicas_done = False, 0
        self._arrived.clear()
        for bucket in self.buckets:
            bucket.forget_gradients()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._courier.close()
