"""Before anything is trained every rank is compared with rank 0: the same bitfleet, libraries, configuration and data."""

import hashlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import bitfleet
from bitfleet.trainer.config import TrainConfig, to_dict
from bitfleet.trainer.ranks.collectives import Ranks, cpu_group, from_first_rank, objects_from_ranks
from bitfleet.trainer.run.versions import versions

MAY_DIFFER = {"data.root"}
"""Fields that belong to a machine: the data may lie elsewhere on it, its contents are compared."""
_SHOWN = 60


def all_facts(ranks: Ranks, device: torch.device, facts_of_job: Mapping[str, str]) -> dict[str, str]:
    """What must be equal on every rank: name -> value. The first difference is told, so what explains others comes first."""
    facts = {f"the version of {name}": version for name, version in versions().items()}
    facts["the number of ranks on its host"] = str(ranks.local_world_size)
    facts["the device"] = device.type
    return facts | dict(facts_of_job) | {f"the source file {name}": sha for name, sha in source_files().items()}


def source_files() -> dict[str, str]:
    """The files that bitfleet runs from: name -> the first 12 digits of the sha256 of its contents."""
    rooms = [path for path in Path(bitfleet.__file__).parent.iterdir() if path.is_dir() and path.name != "__pycache__"]
    return {
        f"{room.name}/{path.relative_to(room.resolve())}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for room in sorted(rooms)
        for path in sorted(room.resolve().rglob("*.py"))
    }


def facts_of_config(config: TrainConfig) -> dict[str, str]:
    """The resolved configuration, a field a fact."""
    return {f"the field {name}": value for name, value in _flat(to_dict(config)).items() if name not in MAY_DIFFER}


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {name: json.dumps(value)}
    parts: dict[str, str] = {}
    for key, each in value.items():
        parts |= _flat(each, f"{name}.{key}" if name else key)
    return parts


def agree(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Compare `facts` with those of rank 0; every rank calls this.

    Raises:
        ValueError: a rank differs; the same sentence on every rank, about the first one that does and its first difference.
    """
    if ranks.world_size == 1:
        return
    group = cpu_group("control")
    expected, host = from_first_rank((dict(facts), socket.gethostname()), group)
    mine = difference(facts, expected)
    sentence = mine and (
        f"rank {ranks.rank} on {socket.gethostname()} differs from rank 0 on {host} in {mine}: all hosts of a job need the same "
        "bitfleet, libraries, configuration and data"
    )
    if problems := [each for each in objects_from_ranks(sentence, group) if each]:
        raise ValueError(problems[0])


def difference(facts: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """The first fact, in the order of `expected`, that is another one, with both values; "" where all are equal."""
    for name in [*expected, *facts]:
        here, there = facts.get(name, "nothing"), expected.get(name, "nothing")
        if here != there:
            return f"{name}: {_short(here)} there, {_short(there)} on rank 0"
    return ""


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
