"""The device of a rank, where torch says it finds GPUs (there are none here)."""

import pytest
import torch

from bitfleet.trainer.distributed import Ranks, choose_device

LAST_OF_FOUR = Ranks(7, 8, 3, 4)


@pytest.mark.parametrize(("num_gpus", "index"), [(4, 3), (8, 3), (1, 0)])
def test_gpu_of_a_rank(num_gpus: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU is the rank's own: srun --gpus-per-task=1 numbers it 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert choose_device("auto", LAST_OF_FOUR) == torch.device("cuda", index)
    assert choose_device("cpu", LAST_OF_FOUR) == torch.device("cpu")


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match="rank 7 is number 3 on its machine, where torch finds 2 GPUs: start at most 2"
    ):
        choose_device("auto", LAST_OF_FOUR)
