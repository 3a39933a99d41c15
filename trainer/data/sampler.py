"""Draw the stream of samples with pure functions of (seed, epoch, sample index), in numpy alone.

Every random number is a keyed hash (SplitMix64) of the seed, the epoch, the sample and the number
of the draw. Order and pixels therefore do not depend on ranks, threads, batches or earlier draws,
and a resume is an offset. Integer arithmetic, the four basic operations and sqrt give the same bits
on every machine and in every numpy; np.exp and np.random's permutations promise neither, so they
are not used.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

UInts = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Purpose of a number, part of its key.
_ORDER, _FLIP, _CROP, OFFICIAL_CROP, _SUBSTITUTE, LIGHTING, RAND_AUGMENT, MIX = range(8)
_CROP_ATTEMPTS = 10
_AREA_RANGE = (0.08, 1.0)
_LOG_MAX_ASPECT = 0.28768207245178085  # log(4/3); the aspect ratio w/h is log-uniform in [3/4, 4/3]


class Windows(NamedTuple):
    """Crop windows of N images: [start, end) in pixels, as (y, x)."""

    starts: npt.NDArray[np.int32] | npt.NDArray[np.float32]
    """Inclusive upper left corners [N, 2]."""
    ends: npt.NDArray[np.int32] | npt.NDArray[np.float32]
    """Exclusive lower right corners [N, 2]."""


def epoch_permutation(seed: int, epoch: int, num_samples: int) -> Ints:
    """Return the order of the samples in an epoch, int64 [num_samples]."""
    return np.argsort(keys(seed, epoch, _ORDER, np.arange(num_samples)), kind="stable")


def micro_batches(
    *,
    seed: int,
    num_samples: int,
    global_batch_size: int,
    num_replicas: int,
    rank: int,
    world_size: int,
    start_step: int,
) -> Iterator[tuple[int, Ints]]:
    """Yield epoch and samples, int64 [N], of a rank's micro-batches, endlessly.

    Step s is global batch k = s % steps_per_epoch of epoch s // steps_per_epoch, that is
    permutation[k*G : (k+1)*G]. Replica r is its r-th slice; a rank takes num_replicas / world_size
    consecutive replicas, in order, at every step. Samples that do not fill a global batch at the
    end of an epoch are dropped.
    """
    steps_per_epoch = num_samples // global_batch_size
    micro_batch_size, replicas_per_rank = global_batch_size // num_replicas, num_replicas // world_size
    assert steps_per_epoch > 0
    assert micro_batch_size * num_replicas == global_batch_size
    assert replicas_per_rank * world_size == num_replicas
    epoch, first = divmod(start_step, steps_per_epoch)
    while True:
        order = epoch_permutation(seed, epoch, num_samples)
        for k in range(first, steps_per_epoch):
            for replica in range(rank * replicas_per_rank, (rank + 1) * replicas_per_rank):
                start = k * global_batch_size + replica * micro_batch_size
                yield epoch, order[start : start + micro_batch_size]
        epoch, first = epoch + 1, 0


def validation_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[Ints]:
    """Return the samples of a rank's validation batches: rank, rank + world_size, ...

    Over all ranks each sample comes once, in the same batches for any number of ranks. The number
    of batches is the same on every rank; the last of some ranks may be shorter than `batch_size`,
    or empty.
    """
    num_batches = -(-num_samples // (world_size * batch_size))
    starts = (np.arange(num_batches) * world_size + rank) * batch_size
    return [np.arange(min(start, num_samples), min(start + batch_size, num_samples)) for start in starts.tolist()]


def random_flips(seed: int, epoch: int, samples: Ints) -> npt.NDArray[np.int32]:
    """Return 1 for samples to mirror left to right (probability 1/2), else 0, int32 [N]."""
    return (keys(seed, epoch, _FLIP, samples) >> np.uint64(63)).astype(np.int32)


def substitute(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """Return the sample that replaces `sample` in attempt 0, 1, ...; a lone one is kept."""
    draw = uniforms(seed, epoch, _SUBSTITUTE, np.array([sample]), attempt + 1)[0, attempt]
    return (sample + 1 + int(draw * max(num_samples - 1, 1))) % num_samples


def random_resized_windows(seed: int, epoch: int, samples: Ints, heights: Ints, widths: Ints) -> Windows:
    """Return windows, int32, distributed as torchvision's RandomResizedCrop.

    scale=(0.08, 1), ratio=(3/4, 4/3). Ten attempts at an area and an aspect ratio that fit, else
    the largest central window with an aspect ratio in the range. All attempts are drawn at once: an
    attempt is a column.
    """
    draws = uniforms(seed, epoch, _CROP, samples, 4 * _CROP_ATTEMPTS)
    area_draw, aspect_draw, y_draw, x_draw = np.split(draws, 4, axis=1)
    low, high = _AREA_RANGE
    side = np.sqrt((heights * widths)[:, None] * (low + (high - low) * area_draw))
    root_aspect = _exp_near_zero((aspect_draw - 0.5) * _LOG_MAX_ASPECT)  # exp of half of a log aspect
    height, width = np.rint(side / root_aspect), np.rint(side * root_aspect)
    fits = (height > 0) & (height <= heights[:, None]) & (width > 0) & (width <= widths[:, None])
    attempt = fits.argmax(axis=1)  # the first that fits
    row = np.arange(len(samples))
    height, width = height[row, attempt], width[row, attempt]
    y = np.floor(y_draw[row, attempt] * (heights - height + 1))
    x = np.floor(x_draw[row, attempt] * (widths - width + 1))
    if not (fitted := fits[row, attempt]).all():
        central = _central_fallback(heights, widths)
        height, width, y, x = (np.where(fitted, *pair) for pair in zip((height, width, y, x), central, strict=True))
    return windows_at(y, x, height, width)


def random_padded_windows(
    seed: int, epoch: int, samples: Ints, heights: Ints, widths: Ints, size: int, padding: int
) -> Windows:
    """Return random `size` x `size` windows, int32, of padded images; starts may be negative.

    Every image must be at least size - 2 * padding pixels high and wide.
    """
    draws = uniforms(seed, epoch, _CROP, samples, 2)
    y = np.floor(draws[:, 0] * (heights + 2 * padding - size + 1)) - padding
    x = np.floor(draws[:, 1] * (widths + 2 * padding - size + 1)) - padding
    return windows_at(y, x, size, size)


def central_windows(heights: Ints, widths: Ints, size: int) -> Windows:
    """Return the `size` x `size` windows, int32, of torchvision's CenterCrop, with padding."""
    return windows_at(_central_start(heights, size), _central_start(widths, size), size, size)


def resized_central_windows(heights: Ints, widths: Ints, size: int) -> Windows:
    """Return the windows, float32, that Resize(256/224 * size) + CenterCrop(size) shows.

    Resized to `size` x `size` they give the pixels of torchvision's two steps: the short side
    becomes size * 256 // 224, the long one is truncated to whole pixels, and the centre is rounded
    half to even.
    """
    short = np.minimum(heights, widths)
    resized_short = size * 256 // 224
    starts, ends = [], []
    for side in (heights, widths):
        resized = resized_short * side // short
        start = _central_start(resized, size)
        starts.append(start * side / resized)
        ends.append((start + size) * side / resized)
    return Windows(np.stack(starts, axis=1).astype(np.float32), np.stack(ends, axis=1).astype(np.float32))


def _central_start(side: Ints, size: int) -> Floats:
    # np.rint rounds half to even, as Python's round in torchvision does; a smaller image is padded
    # by // 2 in front.
    return np.where(side >= size, np.rint((side - size) / 2), -((size - side) // 2))


def _central_fallback(heights: Ints, widths: Ints) -> tuple[Floats, Floats, Floats, Floats]:
    height = np.minimum(heights, np.rint(widths * 4 / 3))
    width = np.minimum(widths, np.rint(heights * 4 / 3))
    return height, width, np.floor((heights - height) / 2), np.floor((widths - width) / 2)


def windows_at(y: Floats | Ints, x: Floats | Ints, height: Floats | Ints | int, width: Floats | Ints | int) -> Windows:
    """Return windows, int32, from upper left corners and sizes [N], or one size for all."""
    starts, ends = np.stack([y, x], axis=1), np.stack([y + height, x + width], axis=1)
    return Windows(starts.astype(np.int32), ends.astype(np.int32))


def uniforms(seed: int, epoch: int, purpose: int, samples: Ints, num_draws: int) -> Floats:
    """Return numbers in [0, 1), float64 [N, num_draws], of SplitMix64 seeded per sample."""
    offsets = np.arange(1, num_draws + 1, dtype=np.uint64) * _GOLDEN
    words = _mix(keys(seed, epoch, purpose, samples)[:, None] + offsets)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keys(seed: int, epoch: int, purpose: int, samples: Ints) -> UInts:
    """Return a random number for each sample, uint64 [N]."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key + _GOLDEN ^ np.array([part], np.uint64))
    return _mix(key + _GOLDEN ^ samples.astype(np.uint64))


def _mix(z: UInts) -> UInts:
    """Apply SplitMix64's output function (Steele, Lea, Flood 2014), a bijection.

    Every output bit depends on every input bit. Unsigned array arithmetic wraps, as it should here.
    """
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _exp_near_zero(x: Floats) -> Floats:
    """Return exp(x), |x| <= 0.15, by its Taylor series: error 1e-15, equal bits everywhere."""
    result = np.ones_like(x)
    for n in range(10, 0, -1):
        result = 1 + x * result / n
    return result
