"""The same run on another number of ranks: four replicas on 1, 2 and 4 ranks end with the same bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitfleet.trainer.checkpoint import checkpoints
from tests.conftest import Launch


def whole_state(run: Path) -> dict[str, Tensor]:
    """Weights, buffers, and the optimizer state of all ranks put together by parameter."""
    (path,) = checkpoints(run)[-1:]
    state = load_file(path / "model.safetensors")
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for file in sorted(path.glob("optimizer-*.safetensors")):
        for name, tensor in load_file(file).items():
            key, first = name.rsplit("/", 1)
            pieces.setdefault(key, []).append((int(first), tensor))
    for key, found in pieces.items():
        offset, parts = 0, []
        for first, tensor in sorted(found, key=lambda piece: piece[0]):
            assert first == offset, key
            offset += tensor.numel()
            parts.append(tensor)
        state[key] = torch.cat(parts)
    return state


@pytest.fixture(scope="module")
def on_one_rank(deepspeed: Launch, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(1, deepspeed, tiny, tmp_path_factory.mktemp("one") / "run")


def train(num_ranks: int, deepspeed: Launch, tiny: list[str], run: Path) -> dict[str, Tensor]:
    options = ["--num_replicas", "4", "--num_threads", "1", "--stop_after_steps", "20", "--run_dir", run]
    done = deepspeed(num_ranks, "launch/train.py", *tiny, *options)
    assert done.returncode == 0, done.stdout
    return whole_state(run)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_four_replicas_on_any_ranks(
    num_ranks: int, on_one_rank: dict[str, Tensor], deepspeed: Launch, tiny: list[str], tmp_path: Path
) -> None:
    state = train(num_ranks, deepspeed, tiny, tmp_path / "run")
    assert state.keys() == on_one_rank.keys()
    assert [name for name in state if state[name].numpy().tobytes() != on_one_rank[name].numpy().tobytes()] == []
    assert any(name.startswith("exp_avg_sq/blocks") for name in state)
    assert any(name.endswith("running_var") for name in state)
