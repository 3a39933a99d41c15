import json
import os

import pytest
import torch

from bitfleet.trainer.run.versions import hardware


def test_machine_is_described_in_json_types() -> None:
    found = json.loads(json.dumps(hardware()))
    assert found["processor"]
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] > 2**28
    assert isinstance(found["gpus"], list)


def test_gpus_are_named_only_where_the_run_uses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert hardware()["gpus"] == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert hardware()["gpus"] == ["GPU 0", "GPU 1"]
