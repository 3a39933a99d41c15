"""The report on the two loaders, where they agree and where they do not."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitfleet.launch.data.compare import compare
from bitfleet.trainer.data import DataConfig, torch_pipeline
from bitfleet.trainer.data.request import Request
from tests.unit.trainer.data.test_images import photo


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for index in range(5):
            photo(50, 60 + index, index).save(tmp_path / "data" / split / "a" / f"{index}.png")
    return tmp_path / "data"


def test_loaders_that_agree(root: Path) -> None:
    config = DataConfig(root=str(root), augmentation="random_resized_crop", image_size=24, num_threads=1)
    report, num_different = compare(config, num_images=5, seed=1, device=torch.device("cpu"))
    assert num_different == 0
    assert report.splitlines()[1].startswith("training         5")
    assert "every image is the same but for rounding" in report


@pytest.mark.parametrize(
    "augmentation", [{"mixup": 0.2, "cutmix": 1.0}, {"loader": "torch", "rand_augment": "rand-m7-mstd0.5-inc1"}]
)
def test_images_are_compared_before_they_are_mixed(root: Path, augmentation: dict[str, Any]) -> None:
    config = DataConfig(root=str(root), augmentation="random_resized_crop", image_size=24, num_threads=1)
    _, num_different = compare(
        dataclasses.replace(config, **augmentation), num_images=5, seed=1, device=torch.device("cpu")
    )
    assert num_different == 0


def test_torch_decodes_on_the_cpu_wherever_dali_does(root: Path) -> None:
    config = DataConfig(root=str(root), augmentation="random_resized_crop", image_size=24, device="gpu")
    with pytest.raises(ValueError, match="data.device='gpu' needs a model that runs on a GPU"):
        compare(config, num_images=5, seed=1, device=torch.device("cpu"))


def test_images_that_they_read_differently_are_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Pillow clipped 16-bit grey to white, while DALI scales it."""
    scaled = torch_pipeline.image_of

    def clipped(request: Request, position: int) -> Image.Image:
        image = scaled(request, position)
        return image.point(lambda value: 255) if request.path(position).endswith("3.png") else image

    monkeypatch.setattr(torch_pipeline, "image_of", clipped)
    for split in ("train", "val"):
        grey = Image.fromarray(np.full((50, 60), 20_000, np.uint16))
        grey.save(root / split / "a" / "3.png")
    config = DataConfig(root=str(root), augmentation="random_resized_crop", image_size=24, num_threads=1)
    report, num_different = compare(config, num_images=5, seed=1, device=torch.device("cpu"))
    assert num_different == 2
    assert report.count("a/3.png: mean |d| 177.0, largest 177") == 2
    assert "2 of these images differ by more than rounding" in report
