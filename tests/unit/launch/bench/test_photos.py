"""Synthetic photos are like ImageNet's; photos of a data set are copied and shrunk."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.launch.bench.photos import Photo, find_photos, make_photo, shrink, write_class_folders
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
    photos = find_photos(root, num_images=15, num_workers=1)
    assert [photo.class_name for photo in photos] == ["a"] * 6 + ["c"] * 3
    for name, copies in (("originals", photos), ("small", list(map(shrink, photos)))):
        write_class_folders(copies, tmp_path / name)
        dataset = open_dataset(DataConfig(root=str(tmp_path / name)))
        assert dataset.classes == ("a", "c")
        assert dataset.train.labels.tolist() == [0] * 6 + [1] * 3
        assert [dataset.train.read(index) for index in range(9)] == [photo.encoded for photo in copies]
        short_sides = np.minimum(dataset.train.heights, dataset.train.widths).tolist()
        assert short_sides == ([256] * 9 if name == "small" else [300, 301, 302, 303, 304, 305, 280, 280, 280])
    assert len(find_photos(root, num_images=4, num_workers=1)) == 3  # one of the four is a PNG


def test_photos_without_a_root_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path))
    photos = find_photos(None, num_images=3, num_workers=1)
    assert photos == [Photo("a", make_photo(index)) for index in range(3)]
    monkeypatch.setattr("bitfleet.launch.bench.photos.make_photo", None)
    assert find_photos(None, num_images=2, num_workers=1) == photos[:2]


def test_a_root_without_photos_is_refused() -> None:
    with pytest.raises(ValueError, match="--root fashion-mnist.*JPEG"):
        find_photos("fashion-mnist", num_images=5, num_workers=1)
