"""Compare every rank with rank 0 before training: the same bitfleet, libraries, configuration and
data."""

import hashlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import bitfleet
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_objects, broadcast_object, cpu_group

_SHOWN = 60


def all_facts(
    ranks: Ranks, device: torch.device, versions: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, str]:
    """Return what must be equal on every rank: name -> value. The first difference is told: what
    explains others comes first.

    Args:
        ranks: this process's place.
        device: where the model runs.
        versions: package -> version.
        config: the resolved configuration as JSON types, without the fields that may differ between
            hosts; empty if there is none.
    """
    facts = {f"the version of {name}": version for name, version in versions.items()}
    facts["the number of ranks on its host"] = str(ranks.local_world_size)
    facts["the device"] = device.type
    facts |= {f"the field {name}": value for name, value in _flat(config).items() if name}
    return facts | {f"the source file {name}": sha for name, sha in source_files().items()}


def source_files() -> dict[str, str]:
    """Return the source files of bitfleet: name -> the first 12 digits of the sha256 of its
    contents."""
    others = {"__pycache__", "packed"}  # which is models/packed
    rooms = [path for path in Path(bitfleet.__file__).parent.iterdir() if path.is_dir() and path.name not in others]
    return {
        f"{room.name}/{path.relative_to(room.resolve())}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for room in sorted(rooms)
        for path in sorted(room.resolve().rglob("*.py"))
    }


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping) or not value:
        return {name: json.dumps(value)}
    parts: dict[str, str] = {}
    for key, each in value.items():
        parts |= _flat(each, f"{name}.{key}" if name else key)
    return parts


def check_same_on_all_ranks(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Compare `facts` with those of rank 0; every rank calls this.

    Raises:
        ValueError: a rank differs; the same sentence on every rank, about the first one that does
            and its first difference.
    """
    if ranks.world_size == 1:
        return
    group = cpu_group("control")
    expected, host = broadcast_object((dict(facts), socket.gethostname()), group)
    mine = difference(facts, expected)
    sentence = mine and (
        f"rank {ranks.rank} on {socket.gethostname()} differs from rank 0 on {host} in {mine}: all hosts of a job need "
        "the same bitfleet, libraries, configuration and data"
    )
    if problems := [each for each in all_gather_objects(sentence, group) if each]:
        raise ValueError(problems[0])


def difference(facts: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """Return the first fact, in the order of `expected`, that differs, with both values; "" if all
    are equal."""
    for name in [*expected, *facts]:
        here, there = facts.get(name, "nothing"), expected.get(name, "nothing")
        if here != there:
            return f"{name}: {_short(here)} there, {_short(there)} on rank 0"
    return ""


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
