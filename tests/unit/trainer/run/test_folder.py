import dataclasses
import json
from pathlib import Path

import pytest

from bitfleet.configs import load_config
from bitfleet.trainer.config import TrainConfig, read_config, to_dict
from bitfleet.trainer.run.folder import write_config


def make(output: Path, **fields: object) -> TrainConfig:
    return dataclasses.replace(load_config("fashion_quickstart"), output=output, **fields)  # type: ignore[arg-type]


def test_config_file_states_revision_and_versions(tmp_path: Path) -> None:
    config = make(tmp_path, seed=7)
    write_config(tmp_path / "run", to_dict(config), {"world_size": 2})
    assert read_config(tmp_path / "run") == config
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["world_size"] == 2
    assert {"python", "torch", "deepspeed"} <= content["versions"].keys()
    assert "git" in content


@pytest.mark.parametrize("text", ["{bad", "[]", "{}"])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json .*damaged"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("section", "changed", "reason"),
    [
        ("optim", {"rule": "bob"}, "optim.rule must be one of .*, not 'bob'"),
        ("model", None, "model: Input should be a dictionary"),
        ("data", {"image_size": "wide"}, "data.image_size: Input should be a valid integer"),
    ],
)
def test_a_configuration_that_is_not_accepted_is_one_sentence(
    section: str, changed: dict[str, object] | None, reason: str, tmp_path: Path
) -> None:
    resolved = to_dict(make(tmp_path))
    resolved[section] = changed and {**resolved[section], **changed}
    write_config(tmp_path, resolved, {})
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json .*\({reason}[^\n]*\): [^\n]*$") as caught:
        read_config(tmp_path)
    assert "Value error" not in str(caught.value)
