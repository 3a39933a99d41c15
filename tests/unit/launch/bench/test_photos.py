"""Synthetic photos are like ImageNet's; photos of a data set are copied and shrunk."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.launch.bench.photos import find_photos, make_photo, write_class_folders, write_small_copies
from bitfleet.trainer.data import DataConfig, open_dataset


def test_synthetic_photos_are_like_those_of_imagenet() -> None:
    encoded = [make_photo(index) for index in range(25)]
    assert 105e3 < np.mean([len(photo) for photo in encoded]) < 118e3
    assert make_photo(3) == encoded[3]
    images = [Image.open(io.BytesIO(photo)) for photo in encoded]
    assert {image.size for image in images} >= {(500, 375), (375, 500)}
    # The sampling of the first component is 1 x 1 in 4:4:4 and 2 x 2 in 4:2:0.
    assert sum(image.layer[0][1:3] == (1, 1) for image in images) == 19  # type: ignore[attr-defined]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, of which the second has no JPEG."""
    folder = tmp_path / "data"
    for class_name, count, form in (("a", 6, "JPEG"), ("b", 6, "PNG"), ("c", 3, "JPEG")):
        for split in ("train", "val"):
            (folder / split / class_name).mkdir(parents=True)
            for index in range(count):
                size = (300 + index, 600) if class_name == "a" else (400, 280)
                Image.new("RGB", size, (index * 20, 90, 0)).save(
                    folder / split / class_name / f"{index}.JPEG", format=form
                )
    return folder


def test_photos_of_a_root_are_copied_and_shrunk(root: Path, tmp_path: Path) -> None:
    found = find_photos(str(root), num_images=15, num_workers=1)
    assert not found.synthetic
    copied = write_class_folders(found, tmp_path / "originals")
    assert copied.classes == ("a", "c")
    assert copied.train.labels.tolist() == [0] * 6 + [1] * 3
    assert copied.train.read(7) == (root / "train/c/1.JPEG").read_bytes()
    small = write_small_copies(copied, tmp_path / "small", num_workers=1)
    assert small.train.labels.tolist() == copied.train.labels.tolist()
    for photos in (copied, small):
        opened = open_dataset(DataConfig(root=str(photos.train.folder)))
        assert opened.classes == photos.classes
        for index in range(len(opened.train)):
            with Image.open(opened.train.path(index)) as image:
                assert image.size == (opened.train.widths[index], opened.train.heights[index])
    assert np.minimum(small.train.heights, small.train.widths).tolist() == [256] * 9
    assert len(find_photos(str(root), num_images=4, num_workers=1).train) == 3  # one of the four is a PNG


def test_photos_without_a_root_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path))
    found = find_photos(None, num_images=3, num_workers=1)
    assert found.synthetic
    assert [found.train.read(index) for index in range(3)] == [make_photo(index) for index in range(3)]
    monkeypatch.setattr("bitfleet.launch.bench.photos.make_photo", None)
    assert len(find_photos(None, num_images=2, num_workers=1).train) == 2


def test_a_root_without_photos_is_refused() -> None:
    with pytest.raises(ValueError, match="--root fashion-mnist.*JPEG"):
        find_photos("fashion-mnist", num_images=5, num_workers=1)
