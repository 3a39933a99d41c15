"""Count what the flips of a sharded optimizer do, over this rank's slices, by parameter. No
communication here.

Every step costs a few operations on packed bits, an eighth of a byte per weight each. Counts that
need gradients and moments are made only in the requested steps. Counts are integers: summed over
the ranks they are the same on any number of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitfleet.optim.kernels.bits import popcount
from bitfleet.optim.sharding.buckets import Bucket
from bitfleet.optim.sharding.optimizer import ShardedOptimizer
from bitfleet.optim.sharding.state import Chunk, packed_chunks

WINDOW = 100
"""Steps over which the flips of a weight are counted; windows follow each other and do not
overlap."""
LOWEST, HIGHEST = -60, 20
"""Octaves of the histogram of |r|, one bin each from 2^LOWEST to 2^HIGHEST; values outside are in
the first or last bin."""
NUM_BINS = HIGHEST - LOWEST
CPU_CHUNK, CHUNK = 1 << 16, 1 << 22  # weights: temporaries that stay in the cache; few launches on a GPU
BITS_PER_WEIGHT = 5
"""Memory of a `FlipHistory`."""

FLIPS, DEAD_BAND, NEVER, OSCILLATORS, AGREEMENT = (
    "flip_ratio",
    "dead_band",
    "never_flipped",
    "oscillators",
    "sign_agreement",
)
KEYS = (FLIPS, DEAD_BAND, NEVER, OSCILLATORS, AGREEMENT)
"""Counts per parameter, in this order; each is reported as a fraction of its weights."""
LOG_RATIO = "log_ratio"
AVERAGE = "exp_avg"
"""State whose sign is compared with the gradient's."""
PI = "pi"


def octave_counts(ratio: Tensor) -> Tensor:
    """Return the histogram of `ratio`, fp32 [n], not negative, over octaves: int64 [NUM_BINS].

    A bin is the exponent of the float, so no logarithm rounds a value into its neighbour.
    """
    exponents = (ratio.view(torch.int32) >> 23).sub_(127 + LOWEST).clamp_(0, NUM_BINS - 1)
    if not ratio.is_cuda:
        return torch.bincount(exponents.to(torch.uint8), minlength=NUM_BINS)
    # On a GPU bincount has the host wait for its largest value.
    counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=ratio.device)
    return counts.scatter_add_(0, exponents.long(), torch.ones_like(exponents, dtype=torch.int64))


def octave_edges() -> list[float]:
    """log10 of the edges of the histogram, NUM_BINS + 1 of them."""
    return [round(octave * math.log10(2.0), 4) for octave in range(LOWEST, HIGHEST + 1)]


def log_flip_ratio(flip_ratio: float) -> float:
    """pi = ln(flip_ratio + e^-9), equation 7 of Bop's paper (arXiv 1906.02107): -9 where nothing
    flips."""
    return math.log(flip_ratio + math.exp(-9.0))


class FlipHistory:
    """Packed memory of the flips of one slice, uint8 [slice_numel / 8] each.

    `ones`, `twos` and `fours` are the digits of a counter for every weight, which stays in `fours`
    once it has been at 4.
    """

    def __init__(self, slice_numel: int, device: torch.device) -> None:
        self.flipped, self.ones, self.twos, self.fours, self.oscillated = torch.zeros(
            BITS_PER_WEIGHT, slice_numel // 8, dtype=torch.uint8, device=device
        )

    def add_(self, flips: Tensor) -> None:
        """Count the flips of a step."""
        self.flipped |= flips
        carry = self.ones & flips
        self.ones ^= flips
        flips_of_four = self.twos & carry
        self.twos ^= carry
        self.fours |= flips_of_four

    def end_window_(self) -> None:
        """Keep the weights that flipped at least four times, and count from 0."""
        self.oscillated, self.fours = self.fours, self.oscillated
        for digit in (self.ones, self.twos, self.fours):
            digit.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Name -> what a checkpoint keeps."""
        return vars(self)


class FlipCounts:
    """Counts the weights of each parameter that a step flips: an observer for the requested
    steps."""

    def __init__(self, sharded: ShardedOptimizer) -> None:
        self.buckets = [bucket for bucket in sharded.buckets if bucket.binary]
        segments = [segment for bucket in self.buckets for segment in bucket.segments]
        self.sizes = {segment.name: segment.param.numel() for segment in reversed(segments)}
        """Parameter -> number of its weights, in the order of the buckets."""
        self._places = {name: place for place, name in enumerate(self.sizes)}
        self._counts = self._zeros(len(self.sizes))

    def _zeros(self, count: int) -> Tensor:
        device = self.buckets[0].weights.device if self.buckets else None
        return torch.zeros(count, dtype=torch.int64, device=device)

    def observe(self, bucket: Bucket, grad: Tensor, flips: Tensor) -> None:
        """Count; an observer of `ShardedOptimizer`."""
        for _, name, _, low, high in bucket.pieces():
            self._counts[self._places[name]] += popcount(flips[low // 8 : -(-high // 8)])

    def take(self) -> Tensor:
        """Return the counts of this rank's slices since the last call, int64 [parameters]."""
        counts = self._counts.clone()
        self._counts.zero_()  # in place: a CUDA graph adds to this tensor
        return counts

    def flip_ratios(self, counts: Sequence[int]) -> dict[str, float]:
        """ "flip_ratio" overall and "flip_ratio/<parameter>" each, of counts that were summed over
        the ranks."""
        return _fractions(FLIPS, self.sizes, dict(zip(self.sizes, counts, strict=True)))


class BitDiagnostics(FlipCounts):
    """Counts of `KEYS` and the histogram of |r|; its memory of earlier flips goes into checkpoints.

    Args:
        sharded: the optimizer, which it observes from now on; some of its parameters are binary.

    Raises:
        ValueError: no parameter is updated as bits.
    """

    def __init__(self, sharded: ShardedOptimizer) -> None:
        super().__init__(sharded)
        if not self.buckets:
            rules = sorted({group["rule"] for group in sharded.param_groups})
            raise ValueError(
                "diagnostics of bits need weights that are updated as bits, but the rules here, "
                f"{', '.join(rules)}, have none"
            )
        self.wanted = False
        """Count the coming step; `take` resets it."""
        self.since = 0
        """Steps that were done when the history started."""
        self._sharded, self._num_windows = sharded, 0
        self._is_counted: bool | Tensor = False
        self._owners = {segment.name: bucket for bucket in self.buckets for segment in bucket.segments}
        self._history = {bucket: FlipHistory(bucket.slice_numel, bucket.weights.device) for bucket in self.buckets}
        self._matrix = self._zeros(len(self.sizes) * len(KEYS)).view(-1, len(KEYS))
        self._bins = self._zeros(NUM_BINS)
        self._threshold: float | None = None
        sharded.observers.append(self.observe)

    def begin(self, since: int) -> None:
        """Continue from the steps that the optimizer has done and from `chunks`; the history
        started after `since` steps."""
        self.since, self._num_windows = since, self._sharded.num_steps // WINDOW

    def chunks(self) -> list[Chunk]:
        """Return this rank's chunks of the history, packed, for a checkpoint of the steps that are
        done."""
        self._end_windows(self._sharded.num_steps)
        return [
            chunk
            for bucket, history in self._history.items()
            for key, tensor in history.tensors().items()
            for chunk in packed_chunks(bucket, key, tensor)
        ]

    def _end_windows(self, num_steps: int) -> None:
        """End the windows that are over after `num_steps`; a skipped step tells no observer, but it
        counts."""
        for _ in range(min(num_steps // WINDOW - self._num_windows, 2)):
            for history in self._history.values():
                history.end_window_()
        self._num_windows = num_steps // WINDOW

    def observe(self, bucket: Bucket, grad: Tensor, flips: Tensor) -> None:
        """Count; an observer of `ShardedOptimizer`."""
        self._end_windows(self._sharded.num_steps - 1)
        history = self._history[bucket]
        history.add_(flips)
        if not self.wanted:
            return
        self._is_counted = self._sharded.updated  # where the device skips a step, it is observed
        if bucket.rule.ratio is not None:  # now: schedules move on before it is reported
            self._threshold = float(bucket.group["threshold"])
        for index, name, _, low, high in bucket.pieces():
            row = self._matrix[self._places[name]]
            row[KEYS.index(FLIPS)] += popcount(flips[low // 8 : -(-high // 8)])
            self._count_moments(bucket, grad, row, index, low, high)

    def _count_moments(self, bucket: Bucket, grad: Tensor, row: Tensor, index: int, low: int, high: int) -> None:
        """Dead band, agreement and histogram of the elements `low`... of a slice, which belong to
        segment `index`."""
        group, step = bucket.group, torch.tensor(float(bucket.steps[index]))
        ratio_of = bucket.rule.ratio
        width = CPU_CHUNK if grad.device.type == "cpu" else CHUNK
        for first in range(low, high, width):
            part = slice(first, min(first + width, high))
            state = {"step": step} | {key: tensor[part] for key, tensor in bucket.state.items()}
            if ratio_of is not None:
                ratio = ratio_of(state, group).abs()
                row[KEYS.index(DEAD_BAND)] += torch.count_nonzero(ratio <= group["threshold"])
                self._bins += octave_counts(ratio)
            if AVERAGE in state:
                row[KEYS.index(AGREEMENT)] += torch.count_nonzero(grad[part].sign() == state[AVERAGE].sign())

    def take(self) -> Tensor:
        """Return the counts of this rank's slices after the step that was `wanted`, for
        `flip_ratios` and `values`.

        Returns:
            int64, to be summed over the ranks; all 0 in the first place when the step was skipped,
            as on every rank.
        """
        self._end_windows(self._sharded.num_steps)
        for bucket, history in self._history.items():
            for _, name, _, low, high in bucket.pieces():
                row, packed = self._matrix[self._places[name]], slice(low // 8, -(-high // 8))
                row[KEYS.index(NEVER)] += high - low - popcount(history.flipped[packed])
                row[KEYS.index(OSCILLATORS)] += popcount(history.oscillated[packed])
        counted = self._is_counted
        if not isinstance(counted, Tensor):
            counted = torch.full((), counted, device=self._bins.device)
        counts = torch.cat([counted.long().view(1), self._matrix.view(-1), self._bins])
        self._matrix.zero_()
        self._bins.zero_()
        self.wanted = self._is_counted = False
        return counts

    def flip_ratios(self, counts: Sequence[int]) -> dict[str, float]:
        """Return the flip ratios of `FlipCounts` from the summed counts of `take`; 0 if the step
        was skipped."""
        return super().flip_ratios(counts[1 + KEYS.index(FLIPS) : 1 + len(KEYS) * len(self.sizes) : len(KEYS)])

    def values(self, counts: Sequence[int]) -> dict[str, Any]:
        """Return what a report says: each of `KEYS` and "pi" overall and as "<key>/<parameter>",
        "threshold", "since", "log_ratio".

        Left out is what does not exist: everything after a skipped step; oscillators before a whole
        window has been seen; what needs r or the average for parameters whose rule has none.

        Args:
            counts: of `take`, summed over the ranks.
        """
        if not counts[0]:
            return {}
        found: dict[str, Any] = {"since": self.since}
        table = counts[1 : 1 + len(KEYS) * len(self.sizes)]
        for place, key in enumerate(KEYS):
            column = dict(zip(self.sizes, table[place :: len(KEYS)], strict=True))
            found |= _fractions(key, {name: self.sizes[name] for name in self.sizes if self._has(key, name)}, column)
        found |= {
            f"{PI}{key.removeprefix(FLIPS)}": log_flip_ratio(found[key]) for key in list(found) if _is_of(FLIPS, key)
        }
        if self._threshold is not None:
            found["threshold"] = self._threshold
            found[LOG_RATIO] = {"edges": octave_edges(), "counts": list(counts[-NUM_BINS:])}
        return found

    def _has(self, key: str, name: str) -> bool:
        if key == OSCILLATORS:
            return (self._num_windows - 1) * WINDOW >= self.since
        bucket = self._owners[name]
        return {DEAD_BAND: bucket.rule.ratio is not None, AGREEMENT: AVERAGE in bucket.state}.get(key, True)


def _is_of(key: str, name: str) -> bool:
    return name == key or name.startswith(key + "/")


def _fractions(key: str, sizes: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, float]:
    """`key` over all parameters of `sizes`, and "key/<parameter>" of each; empty without any."""
    if not sizes:
        return {}
    overall = sum(counts[name] for name in sizes) / sum(sizes.values())
    return {key: overall} | {f"{key}/{name}": counts[name] / size for name, size in sizes.items()}
