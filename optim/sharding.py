"""ZeRO for bits: an optimizer whose gradients, state and updates are sharded over the ranks, and whose weights travel as bits.

A binary weight has no latent copy, so the fp32 master weights and the full-width weight all-gather of ZeRO (arXiv 1910.02054) are
waste here. See the class for the protocol.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bitfleet.optim import shard_state
from bitfleet.optim.buckets import Bucket, make_buckets, tree_sum
from bitfleet.optim.routed import RoutedOptimizer
from bitfleet.optim.sharding_agreement import differing_weights

BUCKET_NUMEL = 1 << 23
MAX_FLIGHTS = 2
"""Reductions under way at a time: one on the wire, one waiting for it. More would only hold more memory."""


class _Flight:
    """A reduction under way: its buffers live until it has landed."""

    def __init__(self, work: dist.Work | None, send: Tensor, received: Tensor) -> None:
        self.work, self.send, self.received = work, send, received


class ShardedOptimizer(torch.optim.Optimizer):
    """Shards any `RoutedOptimizer` (Bop2ndOrder, Bop, or one with groups of several rules) over a process group.

    Protocol, the same for 1..N ranks; each bucket holds parameters of one group, each rank owns one slice of each bucket:

    1. Construction: parameters become views of flat buckets, and take the values of rank 0.
    2. Backward: a hook moves each gradient into its bucket and frees it. A rank runs `num_replicas / N` backward passes (micro-
       batches) a step; their gradients are summed in a binary tree. During the last one a complete bucket is sent at once,
       while backward goes on: an all-to-all gives every rank its slice from every other, buckets always in the same order. What
       arrived is summed in the same tree, continued over the ranks, in fp32: for a power of two of replicas the sum has the same
       bits on 1, 2, 4, ... ranks. The bucket's buffers are freed as it lands.
    3. `step()`: one all-reduce of a few numbers says whether every gradient is finite (if not, no rank updates anything),
       which parameters had one anywhere, and the norm for clipping. The rule updates the slice: binary ones on packed signs.
    4. All-gather: packed signs, 8 weights a byte, for the rules of +-1 weights; values for the others. They are unpacked into
       the parameters.

    With one rank no collective runs. A parameter that no rank used in a step, or that is frozen when the optimizer is built, is
    skipped, as in a plain optimizer.

    Args:
        optimizer: holds groups and hyperparameters (the groups are shared, so schedules may write into either); its own state
            must be empty, and it must not be stepped itself.
        process_group: the ranks; None is the default group, or a single rank where torch.distributed is not initialised.
        num_replicas: micro-batches of a step over all ranks, a multiple of N; None is N. Losses are means over a micro-batch and
            are not scaled by the caller: the optimizer divides by num_replicas.
        bucket_numel: parameters in a bucket, about.
        grad_dtype: what gradients travel as: torch.float32, or torch.bfloat16 at half the traffic; sums are fp32 always.
        max_grad_norm: clip the gradients of full-precision groups (only of those) to this norm over all of them.
        check_every: compare the weights of all ranks before every so many-th step; see `check_agreement`.
    """

    def __init__(
        self,
        optimizer: RoutedOptimizer,
        *,
        process_group: dist.ProcessGroup | None = None,
        num_replicas: int | None = None,
        bucket_numel: int = BUCKET_NUMEL,
        grad_dtype: torch.dtype = torch.float32,
        max_grad_norm: float | None = None,
        check_every: int | None = None,
    ) -> None:
        if grad_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"grad_dtype must be torch.float32 or torch.bfloat16, not {grad_dtype}")
        if optimizer.state:
            raise ValueError("the optimizer to shard has state already: wrap it before its first step")
        self.process_group = process_group
        self.rank, self.world_size = (
            (dist.get_rank(process_group), dist.get_world_size(process_group)) if dist.is_initialized() else (0, 1)
        )
        self.num_replicas = num_replicas or self.world_size
        if self.num_replicas % self.world_size:
            raise ValueError(f"num_replicas is {num_replicas}, which {self.world_size} ranks cannot share equally")
        self.grad_dtype, self.max_grad_norm, self.check_every = grad_dtype, max_grad_norm, check_every
        self.buckets: list[Bucket] = []
        super().__init__(optimizer.param_groups, {})
        self.buckets = make_buckets(self.param_groups, bucket_numel, self.rank, self.world_size)
        self.num_steps = self.num_skipped_steps = 0
        self._flights: dict[int, _Flight] = {}
        self._reduced: dict[int, Tensor] = {}
        self._replicas_done = self._next = 0
        self._in_backward = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for bucket in self.buckets:
            if self.world_size > 1:
                dist.broadcast(bucket.weights, group_src=0, group=self.process_group)
            for index, segment in enumerate(bucket.segments):
                if segment.param.requires_grad:
                    hook = self._hook(bucket, index)
                    self._hooks.append(segment.param.register_post_accumulate_grad_hook(hook))

    # Backward.

    def _hook(self, bucket: Bucket, index: int) -> Callable[[Tensor], None]:
        def on_gradient(_: Tensor) -> None:
            if not self._in_backward:
                self._in_backward = True
                # As DistributedDataParallel does: the end of this backward, whichever parameters it reaches.
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            bucket.add_gradient(index)
            if self._is_last_replica:
                self._launch()

        return on_gradient

    @property
    def _is_last_replica(self) -> bool:
        return self._replicas_done == self.num_replicas // self.world_size - 1

    def _end_backward(self) -> None:
        self._in_backward = False
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
            while len(self._flights) >= MAX_FLIGHTS:
                self._land(next(iter(self._flights)))
            self._send(self._next)
            self._next += 1
        for index, flight in list(self._flights.items()):
            if flight.work is None or flight.work.is_completed():
                self._land(index)

    def _send(self, index: int) -> None:
        bucket = self.buckets[index]
        bucket.end_replica()
        total = bucket.take_gradient()
        if self.world_size == 1:
            self._flights[index] = _Flight(None, total, total)
            return
        send = total.to(self.grad_dtype)
        received = torch.empty_like(send)
        # As bytes, because gloo has no bfloat16.
        work = dist.all_to_all_single(
            received.view(torch.uint8), send.view(torch.uint8), group=self.process_group, async_op=True
        )
        self._flights[index] = _Flight(work, send, received)

    def _land(self, index: int) -> None:
        """Sum what has arrived for bucket `index` over the ranks, and free its buffers."""
        flight = self._flights.pop(index)
        if flight.work is not None:
            flight.work.wait()
        total = tree_sum([part.float() for part in flight.received.view(self.world_size, -1)])
        self._reduced[index] = total if self.num_replicas == 1 else total.div_(self.num_replicas)

    # Step.

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Reduce what is left, update the slices and gather the weights; every rank calls this.

        Raises:
            ValueError: backward has not run num_replicas / N times since the last step, or the model was moved, frozen or
                unfrozen since the optimizer was built.
            RuntimeError: the weights of a rank differ (`check_every`).
        """
        assert closure is None, "a closure cannot be run again by a sharded optimizer"
        for bucket in self.buckets:
            bucket.check_parameters()
        local_replicas = self.num_replicas // self.world_size
        if self._replicas_done != local_replicas:
            raise ValueError(f"step() after {self._replicas_done} of {local_replicas} backward passes of this rank")
        for index in list(self._flights):
            self._land(index)
        if self.check_every and self.num_steps % self.check_every == 0:
            self.check_agreement()
        grads = [self._reduced.pop(index) for index in range(len(self.buckets))]
        used = self._agree(grads)
        self._replicas_done = self._next = 0
        self.num_steps += 1
        if used is None:
            self.num_skipped_steps += 1
            return
        gathers = []
        for index, bucket in enumerate(self.buckets):
            bucket.update_(grads[index], used[index])
            grads[index] = grads[index].new_empty(0)  # freed
            gathers.append(self._gather(bucket))
        for bucket, (work, gathered) in zip(self.buckets, gathers, strict=True):
            if work is not None:
                work.wait()
            if bucket.binary:
                bucket.unpack(gathered)

    def _agree(self, grads: list[Tensor]) -> list[list[bool]] | None:
        """Which parameters have a gradient anywhere, for each bucket; None when one is not finite. Clips on the way."""
        norm_squared = grads[0].new_zeros(())
        total = grads[0].new_zeros(())
        for bucket, grad in zip(self.buckets, grads, strict=True):
            total = total + grad.sum()
            if self.max_grad_norm is not None and not bucket.binary:
                norm_squared = norm_squared + grad.square().sum()
        flags = torch.tensor([float(flag) for bucket in self.buckets for flag in bucket.used], device=total.device)
        facts = torch.cat([torch.stack([(~total.isfinite()).float(), norm_squared]), flags])
        if self.world_size > 1:
            dist.all_reduce(facts, group=self.process_group)
        num_bad, norm_squared_sum, *counts = facts.tolist()
        used, start = [], 0
        for bucket in self.buckets:
            used.append([count > 0 for count in counts[start : start + len(bucket.segments)]])
            start += len(bucket.segments)
            bucket.used = [False] * len(bucket.segments)
        if num_bad:
            return None
        if self.max_grad_norm is not None:
            scale = min(1.0, self.max_grad_norm / (norm_squared_sum**0.5 + 1e-6))
            for bucket, grad in zip(self.buckets, grads, strict=True):
                if not bucket.binary and scale < 1.0:
                    grad.mul_(scale)
        return used

    def _gather(self, bucket: Bucket) -> tuple[dist.Work | None, Tensor]:
        mine = bucket.signs() if bucket.binary else bucket.weights[bucket.begin : bucket.end]
        if self.world_size == 1:
            return None, mine
        if bucket.binary:
            whole = torch.empty(bucket.weights.numel() // 8, dtype=torch.uint8, device=mine.device)
        else:
            whole, mine = bucket.weights, mine.clone()
        return dist.all_gather_single(whole, mine, group=self.process_group, async_op=True), whole

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of a step that was begun, as after a backward pass that raised.

        Raises:
            ValueError: some of them have left for other ranks already.
        """
        super().zero_grad(set_to_none)
        if self._flights or self._reduced:
            raise ValueError("zero_grad() between backward and step(): gradients are under way to the other ranks")
        self._in_backward, self._replicas_done = False, 0
        for bucket in self.buckets:
            bucket.forget_gradients()

    # Looking in from outside.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is built: buckets are laid out once.

        Raises:
            ValueError: afterwards.
        """
        if self.buckets:
            raise ValueError("a sharded optimizer takes no further parameter groups: build it with all of them")
        super().add_param_group(param_group)

    def close(self) -> None:
        """Let go of the parameters, which keep their values, so that another optimizer can take them."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the state and the hyperparameters; to be loaded on the same rank of as many."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"param_groups": groups, "shard": self.shard(), "steps": self.steps(), "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` of the same rank of as many ranks, and from the present weights.

        Raises:
            ValueError: it is of another layout.
        """
        self.load_shard(state_dict["shard"], state_dict["steps"], state_dict["num_steps"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)

    def read_weights(self) -> None:
        """Take over weights that were written into the parameters from outside (a checkpoint that was loaded)."""
        for bucket in self.buckets:
            bucket.read_weights()

    @torch.no_grad()
    def check_agreement(self) -> None:
        """Compare a checksum of the weights of all ranks, and where it differs the weights with their owners' slices.

        Raises:
            RuntimeError: on every rank; names each differing (rank, parameter, first differing element).
        """
        named = differing_weights(self.buckets, self.process_group) if self.world_size > 1 else []
        if named:
            raise RuntimeError(f"the weights of the ranks differ before step {self.num_steps}: {'; '.join(named)}")

    def shard(self) -> dict[str, Tensor]:
        """This rank's share of the state: "<key>/<parameter>/<first element>" -> flat views into it."""
        return shard_state.shard(self.buckets)

    def steps(self) -> dict[str, int]:
        """Updates that each parameter has had; the same on every rank."""
        return shard_state.steps(self.buckets)

    def load_shard(self, tensors: dict[str, Tensor], steps: dict[str, int], num_steps: int) -> None:
        """Continue from what `shard` and `steps` returned on the same rank of as many ranks, and from the present weights.

        Raises:
            ValueError: the shard is of another layout.
        """
        shard_state.load_(self.buckets, tensors, steps)
        self.num_steps = num_steps

    @torch.no_grad()
    def gather_state(self) -> dict[str, dict[str, Tensor]]:
        """The whole optimizer state, parameter name -> key -> tensor of the parameter's shape; every rank calls this."""
        result: dict[str, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            for key, mine in bucket.state.items():
                whole = mine
                if self.world_size > 1:
                    whole = torch.empty(self.world_size * mine.numel(), device=mine.device)
                    dist.all_gather_single(whole, mine, group=self.process_group)
                for segment in bucket.segments:
                    tensor = whole[segment.start : segment.end].view(segment.param.shape).clone()
                    result.setdefault(segment.name, {})[key] = tensor
            for segment, step in zip(bucket.segments, bucket.steps, strict=True):
                result[segment.name]["step"] = torch.tensor(float(step))
        return result
