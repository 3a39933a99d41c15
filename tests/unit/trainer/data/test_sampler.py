"""The stream of samples in numpy alone: order, sharding, crop windows."""

import hashlib
from itertools import islice

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import center_crop

from bitfleet.trainer.data import sampler


def take(
    num_batches: int, *, rank: int = 0, world_size: int = 1, start_step: int = 0, seed: int = 5
) -> list[tuple[int, list[int]]]:
    stream = sampler.micro_batches(
        seed=seed,
        num_samples=107,
        global_batch_size=24,
        num_replicas=12,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
    )
    return [(epoch, samples.tolist()) for epoch, samples in islice(stream, num_batches)]


def sizes(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, height), np.full(count, width)


def test_the_stream_is_the_one_that_checkpoints_were_written_with() -> None:
    """A change here breaks the exact resume of every run that exists: it is a decision, not a
    refactoring."""
    samples = np.arange(64)
    heights, widths = samples % 7 * 50 + 20, samples % 5 * 70 + 20
    digest = hashlib.sha256()
    digest.update(sampler.epoch_permutation(2**64 - 1, 3, 1000).astype("<i8").tobytes())
    digest.update(sampler.random_flips(3, 1, samples).astype("<i4").tobytes())
    for windows in (
        sampler.random_resized_windows(3, 1, samples, heights, widths),
        sampler.random_padded_windows(3, 1, samples, heights, widths, 28, 4),
    ):
        digest.update(windows.starts.astype("<i4").tobytes() + windows.ends.astype("<i4").tobytes())
    assert digest.hexdigest() == "ca9978e70dd2b8b2814f6b7c6fb1389d82eca6dcc698f071996c780d99425515"


def test_permutation_depends_on_seed_and_epoch_and_holds_every_sample_once() -> None:
    orders = [sampler.epoch_permutation(seed, epoch, 500) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    for order in orders:
        assert sorted(order.tolist()) == list(range(500))
        assert abs(np.corrcoef(order, np.arange(500))[0, 1]) < 0.15


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_ranks_share_out_the_replicas_of_one_rank(world_size: int) -> None:
    whole, per_rank = take(60), 12 // world_size
    shares = [take(5 * per_rank, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = [share[step * per_rank : (step + 1) * per_rank] for step in range(5) for share in shares]
    assert [batch for step in steps for batch in step] == whole


@pytest.mark.parametrize("start_step", [0, 1, 3, 4, 5, 8, 11])
def test_resume_is_the_tail_of_the_stream(start_step: int) -> None:
    assert take(24, start_step=start_step) == take((start_step + 2) * 12)[start_step * 12 :]


def test_every_sample_comes_at_most_once_an_epoch() -> None:
    batches = take(3 * 4 * 12)  # 107 // 24 = 4 steps in an epoch
    for epoch in range(3):
        seen = [sample for of_epoch, samples in batches for sample in samples if of_epoch == epoch]
        assert len(seen) == len(set(seen)) == 96


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 4), (4, 4), (16, 4), (17, 4), (21, 4), (97, 8), (10, 100)])
def test_validation_covers_every_sample_once(num_samples: int, batch_size: int, world_size: int) -> None:
    shares = [sampler.validation_batches(num_samples, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) <= batch_size for share in shares for batch in share)
    assert sorted(np.concatenate([batch for share in shares for batch in share])) == list(range(num_samples))


def test_windows_do_not_depend_on_the_batch() -> None:
    samples, shuffled = np.arange(50), np.random.default_rng(0).permutation(50)
    whole = sampler.random_resized_windows(1, 2, samples, *sizes(50, 300, 400))
    part = sampler.random_resized_windows(1, 2, shuffled[:20], *sizes(20, 300, 400))
    np.testing.assert_array_equal(part.starts, whole.starts[shuffled[:20]])
    np.testing.assert_array_equal(part.ends, whole.ends[shuffled[:20]])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (120, 900)])
def test_random_resized_windows_are_distributed_as_in_torchvision(height: int, width: int) -> None:
    count = 6000
    windows = sampler.random_resized_windows(0, 0, np.arange(count), *sizes(count, height, width))
    h, w = (windows.ends - windows.starts).T
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    params = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    top, left, ref_h, ref_w = np.array(params).T

    assert (windows.starts >= 0).all()
    assert (windows.ends <= [height, width]).all()
    quantiles = np.linspace(0.05, 0.95, 19)
    for ours, theirs in (
        (h * w / (height * width), ref_h * ref_w / (height * width)),
        (np.log(w / h), np.log(ref_w / ref_h)),
        (windows.starts[:, 0] / height, top / height),
        (windows.starts[:, 1] / width, left / width),
    ):
        # Sampling error of a quantile of 6,000 draws is about 0.007 on these scales.
        np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(theirs, quantiles), atol=0.035)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5000), (5000, 3), (2, 100), (301, 7)])
def test_random_resized_windows_fall_back_to_the_centre_as_torchvision_does(height: int, width: int) -> None:
    windows = sampler.random_resized_windows(0, 0, np.arange(8), *sizes(8, height, width))
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), [0.08, 1.0], [3 / 4, 4 / 3])
    assert (windows.ends > windows.starts).all()
    assert windows.starts.tolist() == [[top, left]] * 8
    assert windows.ends.tolist() == [[top + h, left + w]] * 8


def test_flips_are_fair_and_independent_of_the_crop() -> None:
    samples = np.arange(4000)
    flips = sampler.random_flips(0, 0, samples)
    starts = sampler.random_padded_windows(0, 0, samples, *sizes(4000, 28, 28), 32, 4).starts
    assert set(flips.tolist()) == {0, 1}
    assert abs(flips.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(flips, starts[:, 1])[0, 1]) < 0.05


def test_padded_windows_are_uniform_over_all_offsets() -> None:
    samples = np.arange(5000)
    windows = sampler.random_padded_windows(0, 0, samples, *sizes(5000, 28, 30), 32, 4)
    assert (windows.ends - windows.starts == 32).all()
    for axis, offsets in ((0, range(-4, 1)), (1, range(-4, 3))):
        values, counts = np.unique(windows.starts[:, axis], return_counts=True)
        assert values.tolist() == list(offsets)
        assert counts.min() > 0.85 * 5000 / len(offsets)


@pytest.mark.parametrize("size", [1, 7, 8])
def test_central_windows_are_those_of_torchvision(size: int) -> None:
    for height in range(1, 14):
        for width in (6, 7, 8, 9, 11):
            image = torch.arange(1, height * width + 1).reshape(1, height, width)
            windows = sampler.central_windows(np.array([height]), np.array([width]), size)
            (y, x), margin = windows.starts[0], 10
            padded = torch.nn.functional.pad(image, [margin] * 4)
            ours = padded[:, y + margin : y + margin + size, x + margin : x + margin + size]
            assert torch.equal(ours, center_crop(image, [size, size]))


def test_substitutes_are_others_and_differ_by_attempt() -> None:
    for num_samples in (2, 3, 9):
        for sample in range(num_samples):
            chosen = [sampler.substitute(3, 1, sample, attempt, num_samples) for attempt in range(200)]
            assert set(chosen) == set(range(num_samples)) - {sample}
    of_epochs = [[sampler.substitute(3, epoch, 7, attempt, 50) for attempt in range(20)] for epoch in range(3)]
    assert len(set(map(tuple, of_epochs))) == 3
    assert sampler.substitute(3, 1, 0, 5, 1) == 0
