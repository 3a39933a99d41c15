"""Evaluation in another precision, and on other images than those of the run."""

import dataclasses
from pathlib import Path

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.trainer.data import open_dataset
from bitfleet.trainer.evaluate import images_before, in_precision
from bitfleet.trainer.ranks.collectives import Ranks

ALONE = Ranks(0, 1, 0, 1)


@pytest.mark.parametrize("fields", [{"on_nonfinite": "stop"}, {"sharding": "zero1"}])
def test_fp16_evaluates_runs_that_could_not_train_in_it(fields: dict[str, str]) -> None:
    config = load_config("cifar_small")
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, **fields))  # type: ignore[arg-type]
    assert in_precision(config, "fp16").engine.precision == "fp16"


@pytest.mark.parametrize("is_of_run", [True, False])
def test_other_training_images_are_named(
    is_of_run: bool, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("fashion_quickstart")
    data = dataclasses.replace(config.data, root=str(tiny_images), loader="torch")
    config = dataclasses.replace(config, data=data, global_batch_size=16)
    dataset = open_dataset(data)
    meta = {"num_replicas": 1, "step": 3, "data_sha": dataset.sha if is_of_run else "other"}
    steps = images_before(meta, config, dataset, 2, ALONE, torch.device("cpu"))
    assert [[len(images) for images in step] for step in steps] == [[16], [16]]
    told = capsys.readouterr().err
    if is_of_run:
        assert not told
    else:
        assert f"measured on the training images of {tiny_images}, whose list of images is not that of the run" in told
