"""The device of a rank and how NCCL is started, where torch says it finds GPUs (there are none
here)."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bitfleet.trainer.ranks.collectives import (
    COLLECTIVE_TIMEOUT,
    Ranks,
    choose_device,
    connect,
    gpu_uuid,
    process_group,
)

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
    with pytest.raises(ValueError, match="rank 7 .*3 .*2 GPUs"):
        choose_device("auto", LAST_OF_FOUR)


@pytest.mark.parametrize(("device", "backend"), [("cuda:1", "nccl"), ("cpu", "gloo")])
def test_nccl_leaves_lost_ranks_to_the_heartbeat(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default its watchdog aborts the process."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.setenv(name, "")  # so that what is set below is taken back
    monkeypatch.delenv(name)
    started: list[tuple[Any, str | None]] = []

    def init(backend: str, **options: Any) -> None:
        started.append(((backend, options["rank"], options["world_size"], options["timeout"]), os.environ.get(name)))

    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr("bitfleet.trainer.ranks.collectives.cpu_group", lambda name: None)
    monkeypatch.setattr("bitfleet.trainer.ranks.collectives.broadcast_object", lambda value, group: value)
    with process_group(torch.device(device), LAST_OF_FOUR):
        pass
    assert started == [((backend, 7, 8, COLLECTIVE_TIMEOUT), "2" if backend == "nccl" else None)]
    monkeypatch.setenv(name, "3")  # the user's own
    with process_group(torch.device(device), LAST_OF_FOUR):
        pass
    assert started[1][1] == "3"


def test_nccl_connects_with_the_rank_s_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[torch.device] = []
    backend = SimpleNamespace(eager_connect_single_device=connected.append)
    group = SimpleNamespace(bound_device_id=None, _get_backend=lambda device: backend)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=group))
    connect(torch.device("cpu"))
    assert (group.bound_device_id, connected) == (None, [])
    connect(device := torch.device("cuda", 1))
    assert (group.bound_device_id, connected) == (device, [device])


@pytest.mark.usefixtures("process_group")
def test_what_nccl_connects_with_is_torch_s() -> None:
    """The names that `connect` uses, on gloo, where they do nothing; groups made afterwards
    work."""
    world = dist.group.WORLD
    assert world is not None
    world._get_backend(torch.device("cpu")).eager_connect_single_device(torch.device("cpu"))
    world.bound_device_id = torch.device("cuda", 0)
    found: list[Any] = [None]
    dist.all_gather_object(found, "a", group=dist.new_group(backend="gloo"))
    assert found == ["a"]


def test_gpu_has_the_uuid_that_all_processes_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    assert [gpu_uuid(torch.device(name)) for name in ("cuda:1", "cpu")] == ["GPU-1", ""]
