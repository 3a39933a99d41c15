"""Check what the ranks compare at the start."""

import dataclasses

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.trainer.config import to_dict
from bitfleet.trainer.ranks import check_same as agreement
from bitfleet.trainer.ranks.check_same import all_facts, difference, source_files
from bitfleet.trainer.ranks.collectives import Ranks


def test_difference_is_the_first_with_both_values() -> None:
    expected = {"a": "1", "b": "2", "c": "3"}
    assert difference(dict(expected), expected) == ""
    assert difference({"a": "1", "b": "5", "c": "6"}, expected) == "b: 5 there, 2 on rank 0"
    assert difference({"a": "1", "b": "2"}, expected) == "c: nothing there, 3 on rank 0"
    assert difference({**expected, "d": "4"}, expected) == "d: 4 there, nothing on rank 0"
    assert difference({"a": "x" * 100}, {"a": "y"}) == f"a: {'x' * 60}... there, y on rank 0"


def test_every_field_of_the_configuration_is_compared() -> None:
    config = load_config("fashion_quickstart")
    other = dataclasses.replace(config, seed=1, data=dataclasses.replace(config.data, image_size=64))
    ranks, cpu = Ranks(0, 2, 0, 2), torch.device("cpu")
    mine, theirs = (all_facts(ranks, cpu, {}, to_dict(each)) for each in (other, config))
    assert {name for name in mine if mine[name] != theirs[name]} == {"the field seed", "the field data.image_size"}


def test_source_files_are_those_of_all_rooms() -> None:
    files = source_files()
    assert {name.split("/")[0] for name in files} == {"configs", "launch", "models", "optim", "trainer"}
    assert files["trainer/data/dali.py"] == source_files()["trainer/data/dali.py"]


def test_facts_begin_with_versions_and_end_with_files() -> None:
    names = list(all_facts(Ranks(0, 2, 0, 2), torch.device("cpu"), {"python": "3"}, {"x": 1}))
    assert names[0] == "the version of python"
    assert names.index("the device") < names.index("the field x") < names.index("the source file trainer/run/stop.py")


@pytest.mark.usefixtures("process_group")
def test_sentence_names_host_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "broadcast_object", lambda value, group: ({"seed": "0"}, "host-a"))
    monkeypatch.setattr(agreement.socket, "gethostname", lambda: "host-b")
    with pytest.raises(ValueError, match="^rank 1 on host-b .*rank 0 on host-a .*seed: 1 .*0 on rank 0"):
        agreement.check_same_on_all_ranks(Ranks(1, 2, 0, 1), {"seed": "1"})
