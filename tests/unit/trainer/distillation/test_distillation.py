from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitfleet.trainer.data import DataConfig, stream_settings
from bitfleet.trainer.distillation import Distillation, DistillConfig, LogitCache, Schedule, Teacher, identity_of_logits
from bitfleet.trainer.distillation.cache import create, layout_for

CPU = torch.device("cpu")
STEPS_PER_EPOCH, SIZE, NUM_CLASSES = 5, 4, 3


def schedule(num_steps: int = 15) -> Schedule:
    return Schedule(STEPS_PER_EPOCH, 2 * SIZE, num_replicas=2, rank=0, world_size=1, num_steps=num_steps)


def images_of(epoch: int, row: int) -> Tensor:
    """A micro-batch as the loader has it."""
    generator = torch.Generator().manual_seed(1000 * epoch + row)
    return torch.randint(0, 256, (SIZE, 2, 2, 3), generator=generator).byte()


def flat(images: Tensor) -> Tensor:
    return images.float().flatten(1) / 255


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(nn.Linear(12, NUM_CLASSES), "ab" * 32, CPU)


@pytest.fixture
def cache(teacher: Teacher, tmp_path: Path) -> LogitCache:
    """Two of the three epochs; 43 images are a rest of 3 more than the batches of the run."""
    identity = identity_of_logits(
        teacher="linear",
        from_file=True,
        weights_sha256=teacher.weights_sha256,
        num_classes=NUM_CLASSES,
        precision="fp32",
        seed=0,
        data_sha="",
        images=stream_settings(DataConfig(), "cpu"),
        micro_batch_size=SIZE,
    )
    cache = create(tmp_path, identity, layout_for(43, NUM_CLASSES, SIZE), {})
    for epoch in range(2):

        def call(row: int, epoch: int = epoch) -> Iterator[Tensor]:
            for first in range(row, 43, SIZE):
                yield teacher(flat(images_of(epoch, first)))

        cache.write_epoch(epoch, call)
    return cache


@pytest.mark.parametrize(
    ("step", "num_steps", "epochs"),
    [
        (0, 15, [0, 1, 2]),
        (0, 11, [0, 1, 2]),
        (0, 10, [0, 1]),
        (4, 10, [0, 1]),
        (5, 10, [1]),
        (9, 10, [1]),
        (10, 10, []),
    ],
)
def test_epochs_that_a_run_reads(step: int, num_steps: int, epochs: list[int]) -> None:
    assert list(schedule(num_steps).epochs_from(step)) == epochs


@pytest.mark.parametrize("start", [0, 3, 5])
def test_targets_are_the_same_called_and_cached(teacher: Teacher, cache: LogitCache, start: int) -> None:
    config = DistillConfig(teacher="linear")
    called, cached = (
        Distillation(config, source, schedule(10), normalize=flat, device=CPU) for source in (teacher, cache)
    )
    for each in (called, cached):
        each.start(start)
    labels = torch.arange(SIZE)
    for number in range(2 * start, 20):
        epoch, row = divmod(number, 2 * STEPS_PER_EPOCH)
        batch = images_of(epoch, SIZE * row), labels
        targets = [each.with_targets(batch) for each in (called, cached)]
        for images, kept, logits in targets:
            assert images is batch[0]
            assert kept is labels
            assert torch.equal(logits, targets[0][2])
    assert targets[0][2].dtype == torch.float16


def test_epochs_that_are_missing_are_found_before_training(teacher: Teacher, cache: LogitCache) -> None:
    config = DistillConfig(teacher="linear")
    Distillation(config, cache, schedule(10), normalize=flat, device=CPU).check_can_continue(0)
    longer = Distillation(config, cache, schedule(15), normalize=flat, device=CPU)
    for step in (0, 10, 14):
        with pytest.raises(ValueError, match="epoch 2 is missing"):
            longer.check_can_continue(step)
    longer.check_can_continue(15)
    Distillation(config, teacher, schedule(15), normalize=flat, device=CPU).check_can_continue(0)


def test_summary_names_source_and_loss(teacher: Teacher, cache: LogitCache) -> None:
    config = DistillConfig(teacher="linear", cache=Path("/logits"), temperature=2.0, label_weight=0.5)
    told = [
        Distillation(each, source, schedule(), normalize=flat, device=CPU).summary()
        for each, source in ((config, cache), (DistillConfig(teacher="linear"), teacher))
    ]
    weights = "teacher linear (weights sha256 abababababab)"
    assert told[0] == f"{weights}, its logits from /logits; temperature 2, labels weigh 0.5"
    assert told[1] == f"{weights}, called in every step; temperature 1"
