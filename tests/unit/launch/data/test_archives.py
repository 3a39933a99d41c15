"""ILSVRC2012's archives: labels, counts and damage."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bitfleet.launch.data import archives
from bitfleet.launch.data.archives import DEVKIT_FILE, TRAIN_FILE, VAL_FILE, list_members
from bitfleet.launch.data.layouts import recognise
from bitfleet.launch.data.prepare import prepare
from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, left_out, open_dataset
from bitfleet.trainer.data.image_list import read_quarantine
from bitfleet.trainer.data.left_out import LeftOut
from tests import miniature
from tests.miniature import BRIGHTNESS, SYNSETS, VAL_SYNSETS, extracted, images_of

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("miniature_counts")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return miniature.archives(tmp_path / "source")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_images_labels_and_sizes(source: Path, tmp_path: Path, num_workers: int) -> None:
    before = miniature.tree(source)
    summary = prepare(source, tmp_path / "dest", num_workers=num_workers)
    assert miniature.tree(source) == before
    assert sorted(os.listdir(tmp_path)) == ["dest", "source"]
    assert sorted(os.listdir(tmp_path / "dest")) == ["manifest.json", "train", "train.tsv", "val", "val.tsv"]
    assert images_of(tmp_path / "dest") == extracted()
    assert "classes   3" in summary
    assert "train     12 images" in summary
    assert f"bitfleet data verify {tmp_path / 'dest'}" in summary

    dataset = open_dataset(DataConfig(root=str(tmp_path / "dest")))
    assert dataset.classes == SYNSETS
    assert dataset.sha in summary
    for images in (dataset.train, dataset.val):
        for index in range(len(images)):
            synset = images.name(index).split("/")[1]
            assert SYNSETS.index(synset) == images.labels[index]
            assert images.heights[index] == 30 + images.labels[index]
            assert images.sizes[index] == len(images.read(index))
    names = [dataset.val.name(i) for i in range(6)]
    assert names == sorted(names)
    # the devkit's id of image 2 is 1, its label 2
    by_number = {int(name[-13:-5]): int(label) for name, label in zip(names, dataset.val.labels, strict=True)}
    assert by_number == {i: SYNSETS.index(synset) for i, synset in enumerate(VAL_SYNSETS, start=1)}


def test_it_trains(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "dest", num_workers=1)
    config = DataConfig(root=str(tmp_path / "dest"), augmentation="random_resized_crop", image_size=8, num_threads=1)
    dataset = open_dataset(config)
    ranks = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": CPU}
    loader = TrainLoader(dataset, config, seed=0, global_batch_size=12, num_replicas=1, **ranks)
    for batches in (loader.batches(), iter(ValidationLoader(dataset, config, **ranks))):
        images, labels = next(batches)
        brightness = images.float().mean((1, 2, 3)).numpy()
        assert np.abs(brightness - np.array(BRIGHTNESS)[labels.numpy()]).max() < 15


def test_cut_off_at_any_place_is_an_error(source: Path, tmp_path: Path) -> None:
    for file in (TRAIN_FILE, VAL_FILE):
        content = (source / file).read_bytes()
        end = len(content.rstrip(b"\0"))
        end += -end % 512
        header = archives.list_members(source / file, LeftOut())[-1].offset - 512
        for length in {0, 100, header, header + 100, 512, 700, end // 1024 * 512, end // 2, end - 512, end - 1, end}:
            (source / file).write_bytes(content[:length])
            with pytest.raises(ValueError, match=rf"archive .*{file} .* download"):
                archives.list_members(source / file, LeftOut())
        (source / file).write_bytes(content[:end])
        with pytest.raises(ValueError, match=rf"archive .*{file} .*incomplete"):
            prepare(source, tmp_path / f"dest-{file}", num_workers=1)
        assert not (tmp_path / f"dest-{file}").exists()
        (source / file).write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "no end", "damaged header"])
def test_a_damaged_inner_archive_is_named(source: Path, tmp_path: Path, how: str) -> None:
    outer = source / TRAIN_FILE
    parts = archives.list_members(outer, LeftOut())
    content = bytearray(outer.read_bytes())
    inner = {part.name: bytes(content[part.offset : part.offset + part.size]) for part in parts}
    whole = inner["n02105855.tar"]
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    inner["n02105855.tar"] = {
        "cut": whole[: end // 2],
        "no end": whole[:end],
        "damaged header": whole[: (second := whole.index(b"n02105855_2"))] + bytes([255]) * 300 + whole[second + 300 :],
    }[how]
    outer.write_bytes(miniature.tar(inner))
    with pytest.raises(ValueError, match=r"n02105855\.tar in .*ILSVRC2012_img_train\.tar .*incomplete"):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest").exists()


def test_a_damaged_devkit_is_named(source: Path, tmp_path: Path) -> None:
    (source / DEVKIT_FILE).write_bytes(miniature.devkit()[:-10])
    with pytest.raises(ValueError, match=rf"{DEVKIT_FILE} .*md5"):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not list(tmp_path.rglob(".devkit"))


def test_a_full_disk_is_not_taken_for_a_damaged_devkit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Path, file: str) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("torchvision.datasets.imagenet.parse_devkit_archive", full)
    with pytest.raises(ValueError, match=r"\.devkit.*file write failed"):
        prepare(source, tmp_path / "dest", num_workers=1)


def test_wrong_classes_are_named(source: Path, tmp_path: Path) -> None:
    inner = {f"{synset}.tar": miniature.tar({"a.JPEG": miniature.photo(0, 1)}) for synset in (*SYNSETS[:2], "n9")}
    (source / TRAIN_FILE).write_bytes(miniature.tar(inner))
    with pytest.raises(ValueError, match=r"1 of the 3 .* missing .*n02105855\) .* 1 .*n9\)"):
        prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)


def test_missing_images(source: Path, tmp_path: Path) -> None:
    photos = miniature.val_photos()
    del photos["ILSVRC2012_val_00000002.JPEG"]
    (source / VAL_FILE).write_bytes(miniature.tar(photos))
    with pytest.raises(ValueError, match="5 validation images: ILSVRC2012 has 6; .* n02105855 has 1, .* 2"):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest").exists()
    summary = prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)
    assert "INCOMPLETE: " in summary
    dataset = open_dataset(DataConfig(root=str(tmp_path / "dest")))
    # the labels go by the numbers in the names, not by the position
    assert [SYNSETS[label] for label in dataset.val.labels] == sorted(VAL_SYNSETS[:1] + VAL_SYNSETS[2:])
    assert all(dataset.val.name(i).split("/")[1] == SYNSETS[dataset.val.labels[i]] for i in range(5))
    assert "INCOMPLETE: " in prepare(source, tmp_path / "dest", num_workers=1)  # still told


@pytest.mark.parametrize("name", ["ILSVRC2012_val_00000007.JPEG", "ILSVRC2012_val_00000000.JPEG", "cat.JPEG"])
def test_a_validation_image_without_label_is_named(source: Path, tmp_path: Path, name: str) -> None:
    (source / VAL_FILE).write_bytes(miniature.tar(miniature.val_photos() | {name: miniature.photo(0, 1)}))
    with pytest.raises(ValueError, match=rf"{name}.* ILSVRC2012_val_00000001.JPEG"):
        prepare(source, tmp_path / "dest", num_workers=1)


def test_an_empty_validation_archive_is_an_error(source: Path, tmp_path: Path) -> None:
    (source / VAL_FILE).write_bytes(miniature.tar({}))
    with pytest.raises(ValueError, match=rf"{VAL_FILE} has no image"):
        prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)


def test_an_unreadable_image_is_named(source: Path, tmp_path: Path) -> None:
    name = "ILSVRC2012_val_00000002.JPEG"
    place = f"val/{VAL_SYNSETS[1]}/{name}"
    (source / VAL_FILE).write_bytes(miniature.tar(miniature.val_photos() | {name: b"<html>"}))
    with pytest.raises(
        ValueError,
        match=rf"{place} from {source} .*\(it is not an image\)",
    ):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert "SET ASIDE: 1 images" in prepare(source, tmp_path / "dest", num_workers=1, quarantine=True)
    assert read_quarantine(tmp_path / "dest") == {place: "it is not an image"}
    assert (tmp_path / "dest" / place).read_bytes() == b"<html>"
    dataset = open_dataset(DataConfig(root=str(tmp_path / "dest")))
    assert (len(dataset.val), dataset.num_quarantined) == (5, 1)


def test_what_is_no_image_in_an_archive_is_counted(source: Path, tmp_path: Path) -> None:
    val = miniature.val_photos() | {"._ILSVRC2012_val_00000001.JPEG": b"", "README.txt": b"", "a/.1.JPEG": b""}
    (source / VAL_FILE).write_bytes(miniature.tar(val))
    inner = miniature.tar_files(source / TRAIN_FILE)
    photos = {
        name.split("/")[1]: photo for name, photo in miniature.train_photos().items() if name.startswith(SYNSETS[0])
    }
    inner[f"{SYNSETS[0]}.tar"] = miniature.tar(photos | {"list.txt": b"", "Thumbs.db": b""})
    (source / TRAIN_FILE).write_bytes(miniature.tar(inner))
    summary = prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)
    assert "left out  train: 1 files of a system" in summary
    assert "1 text or annotations\nleft out  val: 1 files of a system" in summary
    assert "1 hidden" in summary
    assert images_of(tmp_path / "dest") == extracted()


def test_the_training_archive_unpacked_once(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "whole", num_workers=1)
    for index, folder in enumerate(("ILSVRC2012_img_train", "train", ".")):
        once = tmp_path / f"once{index}"
        miniature.write(once, {file: (source / file).read_bytes() for file in (VAL_FILE, DEVKIT_FILE)})
        (once / folder).mkdir(exist_ok=True)
        with tarfile.open(source / TRAIN_FILE) as archive:
            archive.extractall(once / folder, filter="data")
        (once / folder / "._n01440764.tar").write_bytes(b"?")
        assert recognise(once).layout == "ILSVRC2012 archives"
        summary = prepare(once, tmp_path / f"dest{index}", num_workers=1)
        assert images_of(tmp_path / f"dest{index}") == extracted()
        assert "left out  train: 1 files of a system" in summary
    (once / VAL_FILE).unlink()
    with pytest.raises(ValueError, match=rf"{once}/n\*\.tar, .*{VAL_FILE} is missing"):
        recognise(once)


LONG = "d/" * 90 + "é" * 60 + ".jpg"


def add(
    archive: tarfile.TarFile, name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    archive.addfile(info, io.BytesIO(data))


def test_links_are_their_files_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a", kind=tarfile.DIRTYPE)
        add(archive, "a/0.jpg", b"zero")
        add(archive, "a/hard.jpg", kind=tarfile.LNKTYPE, link="a/0.jpg")
        add(archive, "a/soft.jpg", kind=tarfile.SYMTYPE, link="0.jpg")
        add(archive, "b/up.jpg", kind=tarfile.SYMTYPE, link="../a/soft.jpg")
        add(archive, "./dot.jpg", kind=tarfile.SYMTYPE, link="late.jpg")
        add(archive, "late.jpg", b"late!")
        add(archive, "/abs.jpg", b"abs")
        add(archive, "../out.jpg", b"out")
        add(archive, LONG, b"long")
        add(archive, "old.jpg", b"old type", kind=tarfile.AREGTYPE)
        add(archive, "gone.jpg", kind=tarfile.SYMTYPE, link="nowhere.jpg")
        add(archive, "outside.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(archive, "self.jpg", kind=tarfile.SYMTYPE, link="self.jpg")
        add(archive, "folder.jpg", kind=tarfile.SYMTYPE, link="a")
        add(archive, "pipe.jpg", kind=tarfile.FIFOTYPE)
        add(archive, "device", kind=tarfile.CHRTYPE)
    omitted = LeftOut()
    content = path.read_bytes()
    found = {member.name: content[member.offset :][: member.size] for member in list_members(path, omitted)}
    assert found == {
        "a/0.jpg": b"zero",
        "a/hard.jpg": b"zero",
        "a/soft.jpg": b"zero",
        "b/up.jpg": b"zero",
        "./dot.jpg": b"late!",
        "late.jpg": b"late!",
        "/abs.jpg": b"abs",
        "../out.jpg": b"out",
        LONG: b"long",
        "old.jpg": b"old type",
    }
    assert omitted.counts == {left_out.DANGLING: 4, left_out.IRREGULAR: 2}
    assert omitted.examples[left_out.DANGLING] == f"gone.jpg in the archive {path}"


def test_a_sparse_member_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("0.jpg")
        info.pax_headers = {"GNU.sparse.map": "0,4,1000000,0", "GNU.sparse.size": "1000000"}
        info.size = 4
        archive.addfile(info, io.BytesIO(b"data"))
        add(archive, "1.jpg", b"one")
    omitted = LeftOut()
    assert [member.name for member in list_members(path, omitted)] == ["1.jpg"]
    assert omitted.counts == {left_out.SPARSE: 1}
