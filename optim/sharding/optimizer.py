"""ZeRO for bits: an optimizer whose gradients, state and updates are sharded over the ranks, and
whose weights travel as bits.

A binary weight has no latent copy, so the fp32 master weights and the full-width weight all-gather
of ZeRO (arXiv 1910.02054) are waste here. See the class for the protocol.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bitfleet.optim.rules.rule import RoutedOptimizer, check_has_hyperparameters, check_same_rules, numbers_of
from bitfleet.optim.rules.update_counts import UpdateCounts
from bitfleet.optim.sharding import state as shard_state
from bitfleet.optim.sharding.buckets import Bucket, make_buckets
from bitfleet.optim.sharding.finite_flag import FiniteFlag
from bitfleet.optim.sharding.loss_scale import LossScale
from bitfleet.optim.sharding.reduction import Reduction, all_gather_single
from bitfleet.optim.sharding.state import Chunk
from bitfleet.optim.sharding.step_numbers import StepNumbers
from bitfleet.optim.sharding.verify_weights import WeightsDiffer, differing_weights, union
from bitfleet.optim.transitions import KEY, controller_of

BUCKET_NUMEL = 1 << 23

Observer = Callable[[Bucket, Tensor, Tensor], None]
"""(bucket, reduced gradient of this rank's slice [slice_numel], what flipped there: packed, uint8
[slice_numel / 8])."""


class ShardedOptimizer(torch.optim.Optimizer):
    """Shards any `RoutedOptimizer` (Bop2ndOrder, Bop, or one with groups of several rules) over a
    process group.

    Protocol, the same for 1..N ranks; each bucket holds parameters of one group, each rank owns one
    slice of each bucket:

    1. Construction: parameters become views of flat buckets, and take the values of rank 0.
    2. Backward: a hook moves each gradient into its bucket and frees it. A rank runs `num_replicas
       / N` backward passes (micro- batches) a step; their gradients are summed in a binary tree.
       During the last one a complete bucket is sent at once, while backward continues, buckets
       always in the same order (reduction.py says how): every rank gets the sum of its slice over
       all ranks, in the same tree continued over the ranks, in fp32: for a power of two of replicas
       it has the same bits on 1, 2, 4, ... ranks. The bucket's buffers are freed as it lands.
    3. `step()`: one all-reduce of a few numbers says whether every gradient is finite (if not, no
       rank updates anything), which parameters had one anywhere, the norm for clipping, and what
       the last step flipped (transitions.py, where one is set). The rule updates the slice: binary
       ones on packed signs. On a GPU all of this stays on the device.
    4. All-gather: packed signs, 8 weights a byte, for the rules of +-1 weights; values for the
       others. They are unpacked into the parameters.

    With one rank no collective runs. A parameter that no rank used in a step, or that is frozen
    when the optimizer is built, is skipped, as in a plain optimizer. Parameters become contiguous:
    channels_last is lost. After backward they have no `grad` that could be clipped; see
    `max_grad_norm`.

    Args:
        optimizer: holds groups and hyperparameters (the groups are shared, so schedules may write
            into either); its own state must be empty, and it must not be stepped itself.
        process_group: the ranks; None is the default group, or a single rank where
            torch.distributed is not initialised.
        num_replicas: micro-batches of a step over all ranks, a multiple of N; None is N. Losses are
            means over a micro-batch and are not scaled by the caller: the optimizer divides by
            num_replicas.
        bucket_numel: parameters in a bucket, about.
        grad_dtype: what gradients travel as: torch.float32, or torch.bfloat16 at half the traffic;
            sums are fp32 always, but what is rounded before it travels depends on rank and number
            of ranks, and so do the bits.
        max_grad_norm: clip the gradients of full-precision weights (none that are binary or marked
            so) to this norm over all.
        check_every: compare the weights of all ranks every N steps; see `check_agreement`. A
            difference at any other step is overwritten by its gather.
        defers: the host does not wait for the device in a step: it learns one step later that one
            was skipped. Same bits. None: on a GPU.
        scales_loss: for fp16: the caller multiplies each loss by `loss_scale.value`, which the
            optimizer takes out again.
    """

    counts: UpdateCounts | None = None
    """Where set: the updates of this rank's slices are counted there."""

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
        defers: bool | None = None,
        scales_loss: bool = False,
    ) -> None:
        _check(optimizer, grad_dtype, bucket_numel, max_grad_norm, check_every)
        self.process_group = process_group
        self.rank, self.world_size = (
            (dist.get_rank(process_group), dist.get_world_size(process_group)) if dist.is_initialized() else (0, 1)
        )
        self.num_replicas = self.world_size if num_replicas is None else num_replicas
        if self.num_replicas < 1 or self.num_replicas % self.world_size:
            raise ValueError(
                f"num_replicas must be a multiple of the {self.world_size} ranks, or None, not {num_replicas}"
            )
        self.max_grad_norm, self.check_every = max_grad_norm, check_every
        self.observers: list[Observer] = []
        """Called for every update of a binary bucket on this rank, after the update and before the
        weights travel."""
        self.buckets: list[Bucket] = []
        super().__init__(optimizer.param_groups, {})
        self.buckets = make_buckets(self.param_groups, bucket_numel, self.rank, self.world_size)
        self.num_steps = self._num_skipped_steps = 0
        self.keeps_gradients = False
        """Keep the reduced gradients after the update: a CUDA graph has their addresses."""
        self.num_skipped_in_a_row = 0
        """Skipped steps that the host knows of since the last one that was not."""
        self.updated: bool | Tensor = True
        """False if the last step was skipped; bool [] on the device if the host does not know
        yet."""
        device = self.buckets[0].weights.device
        num_binary = sum(bucket.numel for bucket in self.buckets if bucket.binary)
        self.transitions = controller_of(self.param_groups, num_binary, device)
        self.observers += [self.transitions.observe] if self.transitions else []
        self.nonfinite: list[str] = []
        """Parameters whose gradient was not finite in the last step that was skipped, if the host
        waited for it."""
        self.defers = device.type == "cuda" if defers is None else defers
        self.loss_scale = LossScale(device) if scales_loss else None
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        """True if every gradient of the last step was finite, bool [] on the device."""
        self._finite_flag, self._device_numbers = FiniteFlag(device), StepNumbers(device)
        self._advanced: list[list[bool]] | None = None
        self._used: tuple[tuple[bool, ...], Tensor] = (), torch.empty(0)
        for bucket in self.buckets if self.world_size > 1 else ():
            dist.broadcast(bucket.weights, group_src=0, group=self.process_group)
            bucket.read_weights()
        place = {"rank": self.rank, "world_size": self.world_size}
        self._reduction = Reduction(
            self.buckets, process_group, **place, num_replicas=self.num_replicas, grad_dtype=grad_dtype
        )

    # Step.

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Reduce what is left, update the slices and gather the weights; every rank calls this.

        Raises:
            ValueError: backward has not run num_replicas / N times since the last step; the model
                was moved, frozen or unfrozen since the optimizer was built; or there is a closure.
            WeightsDiffer: the weights of a rank differ (`check_every`).
        """
        if closure is not None:
            raise ValueError("step() of a ShardedOptimizer takes no closure: run backward before it")
        for bucket in self.buckets:
            bucket.check_parameters()
        self._reduction.check_complete()
        if self.check_every and self.num_steps % self.check_every == 0:
            self.check_agreement()
        self.collect()
        if self.prepare([list(bucket.used) for bucket in self.buckets]):
            self.update()

    # The three parts of a step. Only `prepare` runs on the host; a CUDA graph holds the others.

    @torch.no_grad()
    def collect(self) -> None:
        """Take the reduced gradients, and have the device find out whether all are finite and scale
        them."""
        self._grads = self._reduction.take()
        first = self._grads[0]
        if self.loss_scale is not None:
            inverse = self.loss_scale.value.reciprocal()  # of a power of two: exact
            for grad in self._grads:
                grad.mul_(inverse)
        norm_squared, total = first.new_zeros(()), first.new_zeros(())
        for bucket, grad in zip(self.buckets, self._grads, strict=True):
            total = total + grad.sum()
            if self.max_grad_norm is not None and bucket.is_clipped:
                norm_squared = norm_squared + grad.square().sum()
        flips = [self.transitions.facts()] if self.transitions else []
        facts = torch.cat([torch.stack([(~total.isfinite()).float(), norm_squared]), self._used_flags(), *flips])
        if self.world_size > 1:
            dist.all_reduce(facts, group=self.process_group)
        self._facts, self.finite = facts, facts[0] == 0
        if self.loss_scale is not None:
            self.loss_scale.update_(self.finite)
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / (facts[1].double().sqrt() + 1e-6)).clamp(max=1.0).float()
            for bucket, grad in zip(self.buckets, self._grads, strict=True):
                if bucket.is_clipped:
                    grad.mul_(scale)

    @torch.no_grad()
    def take_gradients(self) -> tuple[list[Tensor], list[list[bool]]]:
        """Reduce the gradients of a step that is to update nothing; every rank calls this in place
        of `step`.

        Returns:
            For each bucket this rank's slice, fp32 [slice_numel], and which of its parameters any
            rank had a gradient for. `finite` says whether all are finite.

        Raises:
            ValueError: backward has not run num_replicas / N times since the last step.
        """
        self._reduction.check_complete()
        self.collect()
        flags = iter(self._facts.tolist()[2:])
        used = [[next(flags) > 0 for _ in bucket.segments] for bucket in self.buckets]
        for bucket in self.buckets:
            bucket.used = [False] * len(bucket.segments)
        return self._grads, used

    def _used_flags(self) -> Tensor:
        """Return for each parameter whether this rank has a gradient of it, fp32; built again only
        when that changes."""
        used = tuple(flag for bucket in self.buckets for flag in bucket.used)
        if used != self._used[0]:
            self._used = used, torch.tensor(used, dtype=torch.float32, device=self.buckets[0].weights.device)
        return self._used[1]

    def prepare(self, used_here: Sequence[Sequence[bool]]) -> bool:
        """Count the step and send its numbers to the device; every rank calls this between
        `collect` and `update`.

        The host learns here whether the step before was skipped. Only where it must know more at
        once, it waits for the device: see `_must_wait`.

        Args:
            used_here: for each bucket and parameter, whether this rank had a gradient.

        Returns:
            Whether `update` follows; False where the host knows already that it would change
            nothing.
        """
        self._settle()
        for bucket in self.buckets:
            bucket.used = [False] * len(bucket.segments)
        waits = self._must_wait(used_here)
        used = [list(flags) for flags in used_here]
        if waits or not all(map(all, used)):  # what is unused here may be used elsewhere
            num_bad, _, *counts = self._facts.tolist()
            flags = iter(counts)
            used = [[next(flags) > 0 for _ in bucket.segments] for bucket in self.buckets]
            if waits and num_bad:
                self.nonfinite = union(shard_state.nonfinite(self.buckets, self._grads), self.process_group)
                self._grads = self._grads if self.keeps_gradients else []
                self.num_steps += 1
                self._count_skipped()
                self.updated = False
                return False
            if self.transitions:
                is_first = self.num_steps == self._num_skipped_steps
                self.transitions.drive(counts[-2:], self.num_steps, is_first=is_first)
        self.num_steps += 1
        self.updated = True if waits else self.finite
        self._runs = [bucket.advance(flags) for bucket, flags in zip(self.buckets, used, strict=True)]
        if waits:
            self.num_skipped_in_a_row = 0
        else:
            self._finite_flag.put(self.finite)
            self._advanced = used
        self._prepare_numbers()
        return True

    def _prepare_numbers(self) -> None:
        numbers = [
            numbers_of(bucket.group, run.step)
            for bucket, runs in zip(self.buckets, self._runs, strict=True)
            for run in runs
        ]
        self._step_numbers: Sequence[Mapping[str, float | Tensor]] = (
            self._device_numbers.load(numbers) if self.defers else numbers
        )

    def _must_wait(self, used_here: Sequence[Sequence[bool]]) -> bool:
        """Return True if this step's flag is read before its update: the same on every rank.

        That is after a skipped step, so that several in a row are counted without delay; for
        transitions, whose next value depends on a count; and for a first update, which fills state.
        """
        if not self.defers or self.transitions or self.num_skipped_in_a_row > 0:
            return True
        return any(0 in bucket.steps for bucket in self.buckets)

    @torch.no_grad()
    def update(self) -> None:
        """Update the slices and gather the weights; on the device a step that was not finite
        changes nothing."""
        finite = self.finite if self.defers else None
        numbers = iter(self._step_numbers)
        gathers = []
        for index, bucket in enumerate(self.buckets):
            before = bucket.signs().clone() if self._knows_flips(bucket) else None
            for run in self._runs[index]:
                bucket.update_(self._grads[index], run, next(numbers), finite)
                if self.counts is not None:
                    bucket.count(run, self.counts)
            flips = None if before is None else before.bitwise_xor_(bucket.signs())
            if flips is not None:
                for observe in self.observers:
                    observe(bucket, self._grads[index], flips)
            if not self.keeps_gradients:
                self._grads[index] = self._grads[index].new_empty(0)
            gathers.append((*self._gather(bucket), flips if self.world_size == 1 else None))
        for bucket, (work, gathered, flips) in zip(self.buckets, gathers, strict=True):
            if work is not None:
                work.wait()
            if bucket.binary:
                bucket.unpack(gathered, flips)

    def _knows_flips(self, bucket: Bucket) -> bool:
        """Return True if `update` must find the flips of `bucket`: for observers, or to write only
        changes (one rank, CPU)."""
        return bucket.binary and bool(self.observers or (self.world_size == 1 and bucket.weights.device.type == "cpu"))

    def _settle(self) -> None:
        """Learn whether the last step was skipped on the device."""
        if self._advanced is None:
            return
        advanced, self._advanced = self._advanced, None
        if self._finite_flag.read():
            self.num_skipped_in_a_row = 0
            return
        for bucket, used in zip(self.buckets, advanced, strict=True):
            bucket.retract(used)
        self.nonfinite = []  # its gradients are gone
        self._count_skipped()

    def _count_skipped(self) -> None:
        self._num_skipped_steps += 1
        self.num_skipped_in_a_row += 1

    @property
    def num_skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite; waits for the last one."""
        self._settle()
        return self._num_skipped_steps

    def _gather(self, bucket: Bucket) -> tuple[dist.Work | None, Tensor]:
        mine = bucket.signs() if bucket.binary else bucket.weights[bucket.begin : bucket.end]
        if self.world_size == 1:
            return None, mine
        if bucket.binary:
            whole = torch.empty(bucket.weights.numel() // 8, dtype=torch.uint8, device=mine.device)
        else:
            whole, mine = bucket.weights, mine.clone()
        return all_gather_single(whole, mine, group=self.process_group, async_op=True), whole

    def forget_skipped_step(self) -> None:
        """Take back the count of the last step, which was skipped: the run that continues makes it
        again."""
        assert self.updated is False
        self.num_steps -= 1
        self._num_skipped_steps -= 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of a step that was started, as after a backward pass that raised.

        Raises:
            ValueError: some of them have left for other ranks already. One rank can always forget.
        """
        super().zero_grad(set_to_none)
        self._reduction.forget()

    # Looking in from outside.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the optimizer is built: buckets are laid out once.

        Raises:
            ValueError: afterwards.
        """
        if self.buckets:
            raise ValueError("a sharded optimizer takes no further parameter groups: build it with all of them")
        super().add_param_group(param_group)

    def close(self) -> None:
        """Release the parameters, which keep their values, so that another optimizer can take
        them."""
        self._reduction.close()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copies and pickles: neither the buckets' views nor the hooks would survive.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a ShardedOptimizer cannot be copied or pickled: load its state_dict() into one that is built for the "
            "other parameters"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's share of the state and the hyperparameters, to be loaded on the same
        rank of as many.

        Tensors are the optimizer's own, as in torch.optim: the next step changes them, but not the
        counts. copy.deepcopy keeps the state of now.
        """
        groups = [{k: value for k, value in group.items() if k not in ("params", KEY)} for group in self.param_groups]
        self._settle()
        return {
            "param_groups": groups,
            "shard": shard_state.shard(self.buckets),
            "steps": self.steps(),
            "num_steps": self.num_steps,
            "num_skipped_steps": self._num_skipped_steps,
            "loss_scale": self.loss_scale.state() if self.loss_scale else None,
            "flips": int(self.transitions.flips) if self.transitions else 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` of the same rank of as many ranks, and from the present
        weights.

        Raises:
            ValueError: it is of another layout, of other rules, or not of a ShardedOptimizer.
        """
        check_same_rules(self.param_groups, state_dict["param_groups"])
        if "shard" not in state_dict:
            raise ValueError("the state is not of a ShardedOptimizer: load it into the plain optimizer that saved it")
        self._settle()
        shard_state.load_(self.buckets, state_dict["shard"], state_dict["steps"])
        self.num_steps, self._num_skipped_steps = state_dict["num_steps"], state_dict.get("num_skipped_steps", 0)
        if self.loss_scale and state_dict.get("loss_scale"):
            self.loss_scale.load(state_dict["loss_scale"])
        if self.transitions:
            self.transitions.flips.fill_(state_dict["flips"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)

    def read_weights(self) -> None:
        """Read weights that were written into the parameters from outside (a checkpoint that was
        loaded)."""
        for bucket in self.buckets:
            bucket.read_weights()

    def start_signs(self) -> None:
        """Make binary weights that are real their signs, before the first step; rules with latent
        weights start these from the real values."""
        for bucket in self.buckets:
            bucket.start_signs()

    @torch.no_grad()
    def check_agreement(self) -> None:
        """Compare a checksum of the weights of all ranks, and where it differs the weights with
        their owners' slices.

        Raises:
            WeightsDiffer: on every rank; names each differing (rank, parameter, first differing
                element).
        """
        named = differing_weights(self.buckets, self.process_group) if self.world_size > 1 else []
        if named:
            raise WeightsDiffer(f"the weights of the ranks differ before step {self.num_steps}: {'; '.join(named)}")

    def chunks(self) -> list[Chunk]:
        """Return this rank's chunks of the state, flat views by parameter: a checkpoint for any
        number of ranks is made of them."""
        return shard_state.chunks(self.buckets)

    def bit_chunks(self) -> list[Chunk]:
        """Return this rank's chunks of the binary weights, as packed signs."""
        return shard_state.bit_chunks(self.buckets)

    def transition_state(self) -> dict[str, Any] | None:
        """Return what `transitions` needs to continue, if there are any, the same on every rank;
        every rank calls this."""
        if self.transitions is None:
            return None
        flips = self.transitions.flips.clone()
        if self.world_size > 1:
            dist.all_reduce(flips, group=self.process_group)
        return self.transitions.state(int(flips))

    def load_transition_state(self, state: dict[str, Any] | None) -> None:
        """Continue from `transition_state` of any number of ranks."""
        if self.transitions is not None and state is not None:
            self.transitions.load(state, is_main_rank=self.rank == 0)

    def steps(self) -> dict[str, int]:
        """Updates that each parameter has had; the same on every rank. Waits for the last step."""
        self._settle()
        return shard_state.steps(self.buckets)

    def load_steps(self, steps: dict[str, int], num_steps: int, num_skipped_steps: int) -> None:
        """Continue from state that was written into `chunks`, from the present weights, and from
        these counts.

        Raises:
            ValueError: they are of other parameters.
        """
        self._settle()
        shard_state.load_steps_(self.buckets, steps)
        self.num_steps, self._num_skipped_steps = num_steps, num_skipped_steps

    @torch.no_grad()
    def gather_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the whole optimizer state, parameter name -> key -> tensor of the parameter's
        shape; every rank calls this."""
        self._settle()
        result: dict[str, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            for key, mine in bucket.state.items():
                whole = mine
                if self.world_size > 1:
                    whole = torch.empty(self.world_size * mine.numel(), device=mine.device)
                    all_gather_single(whole, mine, group=self.process_group)
                for segment in bucket.segments:
                    tensor = whole[segment.start : segment.end].view(segment.param.shape).clone()
                    result.setdefault(segment.name, {})[key] = tensor
            for segment, step in zip(bucket.segments, bucket.steps, strict=True):
                result[segment.name]["step"] = torch.tensor(float(step))
        return result


def _check(
    optimizer: RoutedOptimizer,
    grad_dtype: torch.dtype,
    bucket_numel: int,
    max_grad_norm: float | None,
    check_every: int | None,
) -> None:
    """Raise ValueError for arguments of `ShardedOptimizer` that make no sense on any rank."""
    if not isinstance(optimizer, RoutedOptimizer):
        name = type(optimizer).__name__
        raise ValueError(f"{name} has no rules to shard: expected a RoutedOptimizer, as build_optimizer returns")
    if optimizer.state:
        raise ValueError("the optimizer to shard has state already: wrap it before its first step")
    for group in optimizer.param_groups:
        check_has_hyperparameters(group)
    if grad_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"grad_dtype must be torch.float32 or torch.bfloat16, not {grad_dtype}")
    if bucket_numel < 1:
        raise ValueError(f"bucket_numel must be at least 1, not {bucket_numel}")
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(f"max_grad_norm must be above 0, or None, not {max_grad_norm}")
    if check_every is not None and check_every < 1:
        raise ValueError(f"check_every must be at least 1, or None, not {check_every}")
