"""Prepared data sets of the tests, and what is in them."""

from pathlib import Path

import pytest

from bitfleet.launch.data import pack
from bitfleet.launch.data.manifest import write_manifest
from bitfleet.trainer.data.image_list import ImageList, Manifest, list_scanned, read_manifest
from bitfleet.trainer.data.scan import scan_root
from tests import miniature
from tests.unit.trainer.data.test_images import photo

SIZES = [(75, 100), (100, 66), (51, 200), (48, 48), (40, 300), (47, 61), (33, 30), (49, 49)]


def prepare(root: Path) -> Path:
    """Give class folders a manifest."""
    scan = scan_root(root)
    lists = {"train": list_scanned(scan.train)[0], "val": list_scanned(scan.val)[0]}
    write_manifest(Manifest(**lists, classes=scan.train.classes, layout="class folders"), root)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def lists(root: Path) -> tuple[ImageList, ImageList]:
    manifest, _ = read_manifest(root)
    return manifest.train, manifest.val


@pytest.fixture
def miniature_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """ILSVRC2012 and CIFAR-10 have the few classes and images of miniature.py."""
    miniature.patch(monkeypatch)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of photos; 24 for training and 24 for validation."""
    root = tmp_path_factory.mktemp("source") / "data"
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for index, size in enumerate(SIZES):
                path = root / split / name / f"{name}.{index}{'.png' if index == 2 else '.JPEG'}"
                photo(*size, label * 100 + index).save(path, comment=b"seen")
    return prepare(root)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_IMAGES_PER_SHARD", 5)
