import json
import os

from bitfleet.trainer.hardware import hardware


def test_machine_is_described_in_json_types() -> None:
    found = json.loads(json.dumps(hardware()))
    assert found["processor"]
    assert found["num_cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] > 2**28
    assert isinstance(found["gpus"], list)
