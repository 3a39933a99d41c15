"""CIFAR-10 becomes class folders of PNG files with the pixels and the order of torchvision's."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.launch.data import cifar
from bitfleet.launch.data.prepare import prepare
from bitfleet.trainer.data import DataConfig, open_dataset
from tests import miniature


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return miniature.cifar(tmp_path / "source", monkeypatch)


def archive(source: Path) -> Path:
    """The batches as the archive, alone in a folder."""
    folder = source.with_name("archive")
    folder.mkdir()
    with tarfile.open(folder / cifar.ARCHIVE, "w:gz") as tar:
        tar.add(source / cifar.FOLDER, cifar.FOLDER)
    return folder / cifar.ARCHIVE


@pytest.mark.parametrize("form", ["folder", "batches", "archive", "folder with archive"])
def test_pixels_and_labels(source: Path, tmp_path: Path, form: str) -> None:
    place = {
        "folder": lambda: source,
        "batches": lambda: source / cifar.FOLDER,
        "archive": lambda: archive(source),
        "folder with archive": lambda: archive(source).parent,
    }[form]()
    prepare(place, tmp_path / "dest", num_workers=1)
    assert sorted(p.name for p in (tmp_path / "dest").iterdir()) == [
        "manifest.json",
        "train",
        "train.tsv",
        "val",
        "val.tsv",
    ]
    dataset = open_dataset(DataConfig(root=str(tmp_path / "dest")))
    assert dataset.classes == miniature.CIFAR_CLASSES
    for split, images, count in (("train", dataset.train, 12), ("val", dataset.val, 6)):
        pixels = np.concatenate(miniature.cifar_pixels(split))
        assert len(images) == count
        for i in range(count):
            _, class_name, file = images.name(i).split("/")
            number = int(file.removesuffix(".png"))
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(images.read(i)))), pixels[number])
            assert images.labels[i] == number % 6 % 3 == miniature.CIFAR_CLASSES.index(class_name)


def test_interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PowerCutError(BaseException):
        pass

    written: list[Path] = []
    write_unsynced = cifar.write_unsynced

    def write_some(path: Path, content: bytes) -> None:
        if len(written) == 5:
            path.with_name(f".tmp-{path.name}").write_bytes(content[:9])
            raise PowerCutError
        write_unsynced(path, content)
        written.append(path)

    prepare(source, tmp_path / "whole", num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "write_unsynced", write_some)
        with pytest.raises(PowerCutError):
            prepare(archive(source), tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest").exists()
    prepare(tmp_path / "archive", tmp_path / "dest", num_workers=2)
    whole, dest = miniature.tree(tmp_path / "whole"), miniature.tree(tmp_path / "dest")
    assert whole.pop("manifest.json") != dest.pop("manifest.json")  # they name their sources
    assert whole == dest


def test_damage_is_named(source: Path, tmp_path: Path) -> None:
    packed = archive(source)
    batch = source / cifar.FOLDER / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cifar-10-batches-py .*: data_batch_2 is missing"):
        prepare(source, tmp_path / "dest", num_workers=1)
    content = gzip.decompress(packed.read_bytes()).rstrip(b"\0")
    checked = gzip.compress(content + bytes(-len(content) % 512))  # tarfile reads on, to the check sum
    packed.write_bytes(checked[:-8] + bytes(8))
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz .*CRC check failed.*download it again"):
        prepare(packed, tmp_path / "dest2", num_workers=1)
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz "):
        prepare(packed, tmp_path / "dest2", num_workers=1)
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(source / cifar.FOLDER / "test_batch", f"{cifar.FOLDER}/test_batch")
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz .*data_batch_1 is missing"):
        prepare(packed, tmp_path / "dest3", num_workers=1)
