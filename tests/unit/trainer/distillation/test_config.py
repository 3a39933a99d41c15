import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bitfleet.configs import load_config
from bitfleet.trainer.config import from_dict, to_dict
from bitfleet.trainer.distillation import DistillConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": "resnet34", "temperature": 0.0}, "distill.temperature must be positive, not 0.0"),
        ({"teacher": "resnet34", "temperature": float("inf")}, "distill.temperature must be positive, not inf"),
        ({"teacher": "resnet34", "label_weight": 1.0}, r"distill.label_weight must be in \[0, 1\), not 1.0"),
        ({"weights": Path("x")}, "distill.weights needs a teacher"),
        ({"cache": Path("x")}, "distill.cache needs a teacher"),
        ({"temperature": 2.0}, "distill.temperature needs a teacher"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**fields)


def test_defaults_are_those_of_reactnet() -> None:
    config = DistillConfig(teacher="resnet34")
    assert (config.temperature, config.label_weight, config.soft_weight, config.loss_scale) == (1.0, 0.0, 1.0, 1.0)
    assert DistillConfig().loss_scale == 1.0
    assert DistillConfig(teacher="resnet34", temperature=4.0, label_weight=0.5).loss_scale == 0.5 + 0.5 * 16


def test_configuration_of_a_run_reads_back() -> None:
    distill = DistillConfig(teacher="resnet34", weights=Path("w.safetensors"), cache=Path("cache"))
    config = dataclasses.replace(load_config("fashion_quickstart"), distill=distill)
    assert from_dict(to_dict(config)) == config
    older = to_dict(config)
    del older["distill"]
    assert from_dict(older).distill == DistillConfig()


def test_cache_does_not_know_replaced_images() -> None:
    config = load_config("fashion_quickstart")
    data = dataclasses.replace(config.data, on_bad_sample="replace")
    distill = DistillConfig(teacher="resnet34", cache=Path("cache"))
    assert dataclasses.replace(config, data=data, distill=dataclasses.replace(distill, cache=None)).data == data
    with pytest.raises(ValueError, match="on_bad_sample replace takes images whose logits distill.cache does not know"):
        dataclasses.replace(config, data=data, distill=distill)
