"""Buckets: parameters of one group laid end to end, of which each rank owns one equal slice. No
communication here.

Layout of a bucket of world_size * slice_numel elements (slice_numel is a multiple of 64, so that a
slice of signs is whole 64-bit words; every parameter of a binary bucket starts at a multiple of 64
for the same reason):

    | param 0 | pad | param 1 | pad | ... | pad to world_size * slice_numel |
    |   slice of rank 0     |  slice of rank 1   | ...                       |
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.optim.kernels.bits import pack_signs, unpack_changed, unpack_signs
from bitfleet.optim.param_groups import is_binary
from bitfleet.optim.rules.counter_random import uniform
from bitfleet.optim.rules.rule import RULES, Group, Rule, State, names_of, start_signs_
from bitfleet.optim.rules.update_counts import UpdateCounts

ALIGN = 64
CHUNK = 262_144
"""Weights that a CPU unpacks at a time: they, their gradient and state stay in its cache. A
multiple of 64."""


class Segment(NamedTuple):
    """Range of a parameter in its bucket."""

    name: str
    param: nn.Parameter
    start: int
    end: int


class Run(NamedTuple):
    """Elements `low` ... `high` - 1 of a slice, which have their `step`-th update."""

    low: int
    high: int
    step: int


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum `parts` in one fixed binary tree: ((0 + 1) + (2 + 3)) + ..., an odd one out waits for the
    next level."""
    level = list(parts)
    while len(level) > 1:
        paired = [a + b for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + level[len(level) & ~1 :]
    return level[0]


def tree_sum_rows(rows: Tensor) -> Tensor:
    """`tree_sum` of the rows of a tensor [N, ...], one addition for each level of the tree instead
    of one for each pair."""
    while len(rows) > 1:
        even = rows[: len(rows) & ~1]
        rows = torch.cat([even[::2] + even[1::2], rows[len(rows) & ~1 :]])
    return rows[0]


class Bucket:
    """Parameters that become views of one flat tensor, and this rank's slice of their state.

    Args:
        named: the parameters, in the order in which backward is expected to reach them.
        group: the parameter group that they belong to; its hyperparameters are read at every
            update.
        rank: this rank.
        world_size: number of slices.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], group: Group, rank: int, world_size: int) -> None:
        self.group = group
        self.rule = RULES[group["rule"]]
        self.binary = self.rule.flips
        """Weights are +-1, exist as packed signs on their owner, and travel as bits."""
        self.is_clipped = not self.binary and not is_binary(named[0][1])
        """Gradients count for, and are scaled to, the largest norm; those of weights that become
        binary are not."""
        self.segments: list[Segment] = []
        end = 0
        for name, param in named:
            start = -(-end // ALIGN) * ALIGN if self.binary else end
            end = start + param.numel()
            self.segments.append(Segment(name, param, start, end))
        self.numel = sum(param.numel() for _, param in named)
        self.slice_numel = -(-end // (ALIGN * world_size)) * ALIGN
        self.begin, self.end = rank * self.slice_numel, (rank + 1) * self.slice_numel
        first = named[0][1]
        filler = torch.ones if self.binary else torch.zeros
        self.weights = filler(world_size * self.slice_numel, dtype=first.dtype, device=first.device)
        for segment in self.segments:
            view = self.weights[segment.start : segment.end].view(segment.param.shape)
            view.copy_(segment.param.detach())
            segment.param.data = view
        self.state = {key: torch.zeros(self.slice_numel, device=first.device) for key in self.rule.state_keys}
        self.bits: Tensor | None = None
        self.real: set[int] = set()
        """Segments of a binary bucket that hold real values: their first update makes them +-1."""
        self._first_updates: set[int] = set()
        self.steps = [0] * len(self.segments)
        self._local: Tensor | None = None
        self._sums: list[tuple[int, Tensor]] = []
        self._expected = {index for index, (_, param) in enumerate(named) if param.requires_grad}
        self._missing = set(self._expected)
        self.used = [False] * len(self.segments)
        self.read_weights()

    # Gradients of this rank's replicas.

    def add_gradient(self, index: int) -> None:
        """Move the gradient of segment `index` into the flat buffer of the current replica."""
        segment = self.segments[index]
        if segment.param.grad is None:
            raise ValueError(
                f"another optimizer took the gradient of {segment.name}: close() the earlier ShardedOptimizer"
            )
        if self._local is None:
            if self._takes_whole(segment.param.grad):
                self._local = segment.param.grad.view(-1)
            else:
                self._local = self._empty()
        if self._local.data_ptr() != segment.param.grad.data_ptr():
            self._local[segment.start : segment.end].view(segment.param.shape).copy_(segment.param.grad)
        segment.param.grad = None
        self._missing.discard(index)
        self.used[index] = True

    def _takes_whole(self, grad: Tensor) -> bool:
        """Return True if `grad` can itself be the buffer: it is the only one of its bucket, as in
        the largest layers."""
        return grad.numel() == self.weights.numel() and grad.dtype == torch.float32 and grad.is_contiguous()

    def _empty(self) -> Tensor:
        """Return room for the gradients of a replica, 0 between the parameters and after the last
        one."""
        buffer = torch.empty(self.weights.numel(), device=self.weights.device)
        for segment, following in zip(self.segments, [*self.segments[1:], None], strict=True):
            end = self.weights.numel() if following is None else following.start
            if segment.end < end:
                buffer[segment.end : end].zero_()
        return buffer

    @property
    def is_complete(self) -> bool:
        """True once every parameter has its gradient of the current replica."""
        return not self._missing

    def end_replica(self) -> None:
        """Add the current replica to the tree of partial sums (a binary counter: level k holds 2^k
        replicas)."""
        local = self._empty() if self._local is None else self._local
        for index, segment in enumerate(self.segments):
            if index in self._missing or index not in self._expected:
                local[segment.start : segment.end].zero_()
        self._local, self._missing = None, set(self._expected)
        level = 0
        while self._sums and self._sums[-1][0] == level:
            local = self._sums.pop()[1].add_(local)
            level += 1
        self._sums.append((level, local))

    def take_gradient(self) -> Tensor:
        """Return the sum over this rank's replicas, fp32 [world_size * slice_numel], and forget
        it."""
        total = self._sums.pop()[1]
        while self._sums:
            total = self._sums.pop()[1].add_(total)
        return total

    def forget_gradients(self) -> None:
        """Drop what has arrived of a step that is not going to be made."""
        self._local, self._sums, self._missing = None, [], set(self._expected)
        self.used = [False] * len(self.segments)

    def check_parameters(self) -> None:
        """Raise ValueError if a parameter is no longer a view of the flat tensor; it is named."""
        start, width = self.weights.data_ptr(), self.weights.element_size()
        for index, segment in enumerate(self.segments):
            if segment.param.numel() and segment.param.data_ptr() != start + width * segment.start:
                raise ValueError(
                    f"the parameter {segment.name} was moved after the optimizer was built: move the model before"
                )
            if segment.param.requires_grad != (index in self._expected):
                raise ValueError(
                    f"requires_grad of the parameter {segment.name} was changed after the optimizer was built: "
                    f"close() it and build another"
                )

    # The update of this rank's slice.

    def advance(self, used: Sequence[bool]) -> list[Run]:
        """Count an update of the segments that are `used`, and return what it covers; fill state
        before a first update.

        Args:
            used: for each segment, whether any rank had a gradient for it; the others keep weight
                and state, as a plain optimizer skips parameters without a gradient.
        """
        self._first_updates = {index for index in self.real if used[index]}
        self._begin_({index for index, is_used in enumerate(used) if is_used and self.steps[index] == 0})
        for index, is_used in enumerate(used):
            self.steps[index] += is_used
        self.real -= self._first_updates
        return list(self._runs(used))

    def retract(self, used: Sequence[bool]) -> None:
        """Take back the count of an `advance`: the update was skipped on the device."""
        for index, is_used in enumerate(used):
            self.steps[index] -= is_used

    def update_(self, grad: Tensor, run: Run, numbers: Mapping[str, float | Tensor], finite: Tensor | None) -> None:
        """Apply the rule to a run of elements of this rank's slice.

        Args:
            grad: the reduced gradient of the slice, fp32 [slice_numel].
            run: of `advance`.
            numbers: of the rule at run.step, see `Rule.numbers`.
            finite: bool [] on the device: False leaves everything as it is. None is True.
        """
        state = {key: tensor[run.low : run.high] for key, tensor in self.state.items()}
        group, grad = {**self.group, **numbers}, grad[run.low : run.high]
        step = {"step": torch.tensor(float(run.step))}
        weights = self.weights[self.begin + run.low : self.begin + run.high]
        if self.binary:
            bits = self.signs()[run.low // 8 : run.high // 8]
            if run.step == 1 and self._first_updates:
                # Gradients are finite here: the host reads the flag of every first update before it
                # is made.
                self.rule.update_(weights, grad, state | step, group)
                pack_signs(weights, out=bits)
            elif self.rule.update_bits_ is not None:
                self.rule.update_bits_(bits, grad, state | step, group, finite)
            else:
                guard = nullcontext() if finite is None else unless_nonfinite(finite, [bits, *state.values()])
                with guard:
                    update_unpacked_(self.rule, bits, grad, state | step, group)
            return
        guard = nullcontext() if finite is None else unless_nonfinite(finite, [weights, *state.values()])
        with guard:
            self.rule.update_(weights, grad, state | step, group)

    def count(self, run: Run, counts: UpdateCounts) -> None:
        """Add the elements of each parameter in `run`, which the rule has updated."""
        for _, name, _, low, high in self.pieces():
            if (num_elements := min(high, run.high) - max(low, run.low)) > 0:
                counts.add(name, self.rule.name, num_elements)

    @torch.no_grad()
    def start_signs(self) -> None:
        """Make weights that are still real their signs, after the rule has filled its state from
        them, in place of their first update."""
        if not self.real:
            return
        self._first_updates = set(self.real)
        self._begin_(self._first_updates)
        self._first_updates = set()
        start_signs_(self.weights)
        self.read_weights()

    def _begin_(self, indices: set[int]) -> None:
        """Fill the state of the segments `indices`, which are about to have their first update,
        where the rule asks for it.

        State that is there already was seeded (seeding.py) and stays.
        """
        begin_ = self.rule.begin_
        if begin_ is None:
            return
        for index, name, first, low, high in self.pieces():
            for start in range(low, high, CHUNK) if index in indices else ():
                end = min(start + CHUNK, high)
                numbers = uniform(self.group["seed"], name, first + start - low, end - start, self.weights.device)
                state = {key: tensor[start:end] for key, tensor in self.state.items()}
                if any(bool(tensor.any()) for tensor in state.values()):
                    continue
                begin_(self.owned(start, end), numbers, self.segments[index].param.shape, state, self.group)

    def owned(self, low: int, high: int) -> Tensor:
        """Weights `low` ... `high` - 1 of this rank's slice; of a binary bucket, where `low` is a
        multiple of 8, a copy."""
        if not self.binary or self._first_updates:
            return self.weights[self.begin + low : self.begin + high]
        bits = self.signs()[low // 8 : -(-high // 8)]
        return unpack_signs(bits, torch.empty(8 * bits.numel(), device=bits.device))[: high - low]

    def _runs(self, used: Sequence[bool]) -> Iterator[Run]:
        """Yield runs of elements that are updated alike; usually the whole slice."""
        if all(used) and len(set(self.steps)) == 1:
            yield Run(0, self.slice_numel, self.steps[0])
            return
        places = self._aligned() if self.binary else [(segment.start, segment.end) for segment in self.segments]
        for index, ((start, end), is_used) in enumerate(zip(places, used, strict=True)):
            low, high = max(start, self.begin) - self.begin, min(end, self.end) - self.begin
            if is_used and low < high:
                yield Run(low, high, self.steps[index])

    def signs(self) -> Tensor:
        """Return this rank's slice of the weights as bits, uint8 [slice_numel / 8]; packed on the
        first call."""
        if self.bits is None:
            self.bits = pack_signs(self.weights[self.begin : self.end])
        return self.bits

    def unpack(self, gathered: Tensor, changed: Tensor | None = None) -> None:
        """Write the gathered signs of all slices into the parameters that are +-1.

        Args:
            gathered: uint8 [world_size * slice_numel / 8].
            changed: same shape, 1 for weights that the parameters do not hold yet. None: not known.
        """
        if not self.real:
            if changed is None or self._first_updates:
                unpack_signs(gathered, self.weights)
            else:
                unpack_changed(changed, gathered, self.weights)
            return
        for index, (start, end) in enumerate(self._aligned()):
            if index not in self.real:
                unpack_signs(gathered[start // 8 : end // 8], self.weights[start:end])

    def _aligned(self) -> list[tuple[int, int]]:
        """Return start and end of each segment of a binary bucket, with the padding after it."""
        return [(segment.start, -(-segment.end // ALIGN) * ALIGN) for segment in self.segments]

    def read_weights(self) -> None:
        """Forget the packed signs: the parameters were written from outside."""
        self.bits = None
        if self.binary and not self.weights.is_meta:
            held = enumerate(segment.param.detach() for segment in self.segments)
            self.real = {index for index, weight in held if not bool((weight.abs() == 1).all())}

    # Comparison between ranks.

    @property
    def travels_as_bits(self) -> bool:
        """Return True if all weights are +-1 and are sent as bits; False for values, also those
        before a first update."""
        return self.binary and not self.real

    def wire_form(self) -> Tensor:
        """Return a copy of all weights in a form whose words can be compared: packed signs, or the
        values' bits as integers."""
        if self.travels_as_bits:
            return pack_signs(self.weights)
        return self.weights.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[self.weights.element_size()]).clone()

    def checksum(self) -> Tensor:
        """Return a 64-bit sum over the weights, int64 [], with odd factors: one changed word always
        changes it."""
        words = self.wire_form()
        factors = torch.arange(1, 2 * words.numel(), 2, device=words.device)
        return (words.to(torch.int64) * factors).sum()

    def differences(self, truth: Tensor) -> list[tuple[str, int]]:
        """Return the parameters whose weights differ from `truth` (a wire form), each with its
        first differing element."""
        here, differences = self.wire_form(), []
        for segment in self.segments:
            low, high = segment.start, segment.end
            if self.travels_as_bits:
                low, high = low // 8, -(-high // 8)
            differs = (truth[low:high] != here[low:high]).nonzero()
            if len(differs):
                first = int(differs[0])
                if self.travels_as_bits:
                    changed = int(truth[low + first]) ^ int(here[low + first])
                    first = 8 * first + (changed & -changed).bit_length() - 1
                differences.append((segment.name, first))
        return differences

    def pieces(self) -> Iterator[tuple[int, str, int, int, int]]:
        """(segment index, name, first element within the parameter, low, high) of the parameters in
        this slice."""
        for index, segment in enumerate(self.segments):
            low, high = max(segment.start, self.begin), min(segment.end, self.end)
            if low < high:
                yield index, segment.name, low - segment.start, low - self.begin, high - self.begin


@contextmanager
def unless_nonfinite(finite: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Undo on the way out what happened to `tensors` inside, where `finite` (bool []) is False; the
    host does not wait.

    For rules that know no such flag: costs a copy of each tensor and a pass over it.
    """
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))


def update_unpacked_(rule: Rule, bits: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """Apply `rule` to packed weights, in place: chunk by chunk on unpacked ones.

    Args:
        rule: has no `update_bits_`.
        bits: uint8 [n / 8], the signs of n weights; n is a multiple of 8.
        grad: fp32 [n], gradient with respect to the +-1 weights.
        state: of the rule, fp32 [n] each, and "step".
        group: holds the hyperparameters and numbers of the step.
    """
    numel = grad.numel()
    size = min(CHUNK, numel) if grad.device.type == "cpu" else numel
    weights = torch.empty(size, device=grad.device)
    for low in range(0, numel, max(size, 1)):
        high = min(low + size, numel)
        here = bits[low // 8 : high // 8]
        part = {key: tensor if key == "step" else tensor[low:high] for key, tensor in state.items()}
        unpacked = unpack_signs(here, weights[: high - low])
        rule.update_(unpacked, grad[low:high], part, group)
        pack_signs(unpacked, out=here)


def make_buckets(groups: Sequence[Group], bucket_numel: int, rank: int, world_size: int) -> list[Bucket]:
    """Cut the parameters of `groups` into buckets of about `bucket_numel` elements.

    Backward reaches the parameters of a group roughly in the reverse order of their creation, so
    the last ones come first.
    """
    buckets = []
    for number, group in enumerate(groups):
        named: list[tuple[str, nn.Parameter]] = []
        for name, param in reversed(list(zip(names_of(number, group), group["params"], strict=True))):
            same_kind = not named or _kind(named[0][1]) == _kind(param)
            if named and (not same_kind or sum(p.numel() for _, p in named) + param.numel() > bucket_numel):
                buckets.append(Bucket(named, group, rank, world_size))
                named = []
            named.append((name, param))
        if named:
            buckets.append(Bucket(named, group, rank, world_size))
    return buckets


def _kind(param: nn.Parameter) -> tuple[torch.dtype, torch.device, bool]:
    """Return what the parameters of a bucket have in common."""
    return param.dtype, param.device, is_binary(param)
