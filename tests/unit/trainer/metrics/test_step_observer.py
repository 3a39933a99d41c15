"""Check what is read at a logging step of a resumed run."""

from collections.abc import Sequence

import pytest
import torch

from bitfleet.trainer.metrics.step_observer import FlipReport, StepObserver, StepReport
from bitfleet.trainer.ranks.collectives import Ranks


class NoFlips:
    def before_step(self) -> None: ...

    def take(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def report(self, counts: Sequence[int]) -> FlipReport:
        return FlipReport({}, {})


@pytest.mark.usefixtures("process_group")
def test_images_of_before_an_interruption_count_in_the_means_and_not_in_the_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("bitfleet.trainer.metrics.step_observer.time.perf_counter", lambda: now)
    observer = StepObserver(Ranks(0, 1, 0, 1), torch.device("cpu"), NoFlips(), counts_replaced=False)
    observer.load([3.0 * 96, 0.0, 0.0, 96.0])

    def read(seconds: float) -> StepReport:
        nonlocal now
        observer.meter.add(torch.tensor(1.0), torch.randn(32, 10), torch.zeros(32, dtype=torch.int64))
        now += seconds
        return observer.read(num_skipped_steps=lambda: 0, num_replaced=0, log=print)

    first, second = read(2.0), read(4.0)
    assert (first.train.num_images, first.train.loss, first.images_per_second) == (128, 2.5, 16.0)
    assert (second.train.num_images, second.images_per_second) == (32, 8.0)
