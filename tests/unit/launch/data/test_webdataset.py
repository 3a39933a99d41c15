"""WebDataset shards: images are found within them, with their labels and classes."""

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from bitfleet.launch.data import webdataset
from bitfleet.launch.data.archives import Member
from bitfleet.launch.data.prepare import prepare
from bitfleet.launch.data.source import Listing
from bitfleet.launch.data.webdataset import samples, unpack
from bitfleet.trainer.data import DataConfig, left_out, open_dataset
from bitfleet.trainer.data.left_out import LeftOut
from tests import miniature
from tests.miniature import SYNSETS, photo

TRAIN = {"0.cls": b"0", "0.jpg": photo(0, 1), "1.cls": b"1\n", "1.png": photo(1, 3)}


pytestmark = pytest.mark.usefixtures("miniature_counts")


def index(folder: Path, train: Mapping[str, bytes], val: Mapping[str, bytes] = TRAIN) -> Listing:
    miniature.write(folder, {"train.tar": miniature.tar(train), "val.tar": miniature.tar(val)})
    return webdataset.list_shards(folder, ["train.tar"], ["val.tar"], num_workers=1)


@pytest.mark.parametrize("form", ["cls", "json"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_images_are_found_in_their_shards(tmp_path: Path, form: str, num_workers: int) -> None:
    source = miniature.shards(tmp_path / "source", form=form)
    prepare(source, tmp_path / "dest", num_workers=num_workers)
    dataset = open_dataset(DataConfig(root=str(tmp_path / "dest")))
    assert dataset.classes == SYNSETS
    photos = {name.split("/")[1]: data for name, data in (miniature.train_photos() | miniature.val_by_class()).items()}
    for images, count in ((dataset.train, 12), (dataset.val, 6)):
        assert len(images) == count
        for i in range(count):
            name = images.name(i).rsplit("/", 1)[1].replace(".jpg", ".JPEG")
            assert images.read(i) == photos[name]
            assert images.heights[i] == 30 + images.labels[i]
    # the order of the shards, then their own
    names = list(miniature.train_photos())
    ordered = [f"imagenet-train-0000.tar/{name.split('/')[1]}" for name in names[5:]]
    ordered += [f"imagenet-train-0001.tar/{name.split('/')[1]}" for name in names[:5]]
    assert [dataset.train.name(i).replace(".jpg", ".JPEG") for i in range(12)] == ordered
    assert dataset.val.name(0).startswith("val/0.tar/")


def test_classes(tmp_path: Path) -> None:
    assert index(tmp_path, TRAIN).manifest.classes == ("0", "1")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    assert index(tmp_path, TRAIN).manifest.classes == ("cat", "dog", "bird")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\nsmall\xe2\x80\xa8dog\r\n\xe9lan\r\n")
    assert index(tmp_path, TRAIN).manifest.classes == ("cat", "small\u2028dog", os.fsdecode(b"\xe9lan"))
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    with pytest.raises(ValueError, match=r"2 training images: .* bird has 0"):
        prepare(tmp_path, tmp_path / "dest", num_workers=1)
    for text in ("", "cat\n\ndog\n", "cat\ncat\n"):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(ValueError, match=r"classes\.txt "):
            index(tmp_path, TRAIN)


def test_keys_and_suffixes(tmp_path: Path) -> None:
    files = {
        "a/0.jpg": photo(0, 1),
        "a/0.JSON": b'{"cls": 1, "filename": "x"}',
        "b/0.seg.png": b"another picture of the sample",
        "b/0.JPEG": photo(1, 1),
        "b/0.json": b'{"label": 7}',
        "b/0.cls": b"0",  # .cls is asked first
        "b/0.txt": b"a caption",
        ".hidden": b"",
    }
    listing = index(tmp_path, files)
    train = listing.manifest.train
    assert [train.name(i) for i in range(2)] == ["train.tar/a/0.jpg", "train.tar/b/0.JPEG"]
    assert train.labels.tolist() == [1, 0]
    assert listing.omitted["train"].counts == {left_out.HIDDEN: 1, left_out.SIDE_IMAGE: 1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"0.jpg": photo(0, 1)},
            r"the image 0\.jpg in the shard .*/train\.tar has no label: expected 0\.cls, or 0\.json",
        ),
        ({"0.jpg": photo(0, 1), "0.cls": b"cat"}, r"the image 0\.jpg .* has no label: 0\.cls is b'cat'"),
        ({"0.jpg": photo(0, 1), "0.json": b'{"label": "1"}'}, r"has no label: 0\.json is"),
        ({"0.jpg": photo(0, 1), "0.json": b"[]"}, r"has no label: 0\.json is"),
        ({"0.jpg": photo(0, 1), "0.json": b"{"}, r"has no label: 0\.json is"),
        ({"0.jpg": photo(0, 1), "0.cls": b"-1"}, r"the image 0\.jpg .* has the label -1; expected 0 to"),
        ({"0.jpg": photo(0, 1), "0.cls": b"9" * 30}, r"has the label 9{30}; expected 0 to"),
        ({"0.jpg": photo(0, 1), "0.cls": b"1"}, r"train\.tar/0\.jpg has the label 1, and there are 1 training images"),
        ({"0.txt": b""}, r"shards of train in .* have no image with a label: .* 1 files named \*\.txt"),
        ({}, r"shards of train in .* have no image with a label: .* 1 shards without an image, .*/train\.tar"),
        ({"0.jpg": photo(0, 1), "0.cls": b"0"}, r"val\.tar/1\.png has the label 1, which no training image has"),
    ],
)
def test_wrong_samples_are_named(tmp_path: Path, files: Mapping[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index(tmp_path, files)


def test_a_label_that_the_list_of_classes_has_not(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\n")
    listing = index(tmp_path, TRAIN)
    assert len(listing.manifest.train) == 1
    assert listing.omitted["train"].counts == {left_out.NO_CLASS: 1}
    with pytest.raises(ValueError, match=r"1\.png .*train\.tar .*label 1; .*0 to 0"):
        prepare(tmp_path, tmp_path, num_workers=1)


def test_a_shard_that_is_cut_off(tmp_path: Path) -> None:
    index(tmp_path, TRAIN)
    content = (tmp_path / "val.tar").read_bytes()
    for length in (len(content.rstrip(b"\0")) // 2, 512 * 4):
        (tmp_path / "val.tar").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"/val\.tar .*incomplete"):
            webdataset.list_shards(tmp_path, ["train.tar"], ["val.tar"], num_workers=1)


@pytest.mark.parametrize("form", ["{key}", "photo.{key}", "v1.2/{key}", "photo{key}.image"])
def test_every_form_of_a_key_is_read_to_the_last_image(tmp_path: Path, form: str) -> None:
    photos = [photo(label, number) for label in (0, 1) for number in (1, 2, 3, 4)]
    files: dict[str, bytes] = {}
    for index, data in enumerate(photos):
        key = form.format(key=f"{index:05d}")
        files |= {f"{key}.jpg": data, f"{key.removesuffix('.image')}.cls": b"%d" % (index // 4)}
    miniature.write(
        tmp_path / "source", {"train/0.tar": miniature.tar(files), "validation/0.tar": miniature.tar(files)}
    )
    prepare(tmp_path / "source", tmp_path / "dest", num_workers=1)
    dataset = open_dataset(DataConfig(root=str(tmp_path / "dest")))
    assert [dataset.train.read(i) for i in range(8)] == photos
    assert dataset.val.labels.tolist() == [0] * 4 + [1] * 4
    assert dataset.notes == ()


def test_links_are_read_from_where_they_lead(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, data, link in (
            ("0.jpg", photo(0, 1), ""),
            ("0.cls", b"0", ""),
            ("1.jpg", b"", "0.jpg"),
            ("1.cls", b"1", ""),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), tarfile.LNKTYPE if link else tarfile.REGTYPE, link
            archive.addfile(info, io.BytesIO(data))
    miniature.write(tmp_path, {"val.tar": miniature.tar(TRAIN)})
    train = webdataset.list_shards(tmp_path, ["train.tar"], ["val.tar"], num_workers=1).manifest.train
    assert train.labels.tolist() == [0, 1]
    assert train.read(1) == train.read(0) == photo(0, 1)


def test_all_damaged_shards_are_named(tmp_path: Path) -> None:
    for name in ("train.tar", "train2.tar", "val.tar"):
        content = miniature.tar(TRAIN)
        miniature.write(tmp_path, {name: content if name == "train.tar" else content[:900]})
    with pytest.raises(ValueError, match=r"/train2\.tar .*/val\.tar "):
        webdataset.list_shards(tmp_path, ["train.tar", "train2.tar"], ["val.tar"], num_workers=1)


def test_what_lies_beside_the_shards_is_said(tmp_path: Path) -> None:
    source = miniature.shards(tmp_path / "source")
    miniature.write(source, {"other.tar": b"", "val/0.idx": b"", "val/0.json": b"{}", "meta.csv": b""})
    assert "left out  root: 2 other files or folders" in prepare(source, tmp_path / "dest", num_workers=1)


def compressed(folder: Path, suffix: str, mode: str) -> Path:
    """The shards of miniature.py, one of training as it is."""
    miniature.shards(folder / "plain")
    for file in (folder / "plain").rglob("*.tar"):
        name = str(file.relative_to(folder / "plain"))
        files = dict(miniature.tar_files(file))
        packed = name if name.endswith("0000.tar") else name.removesuffix(".tar") + suffix
        miniature.write(folder / "packed", {packed: miniature.tar(files, "w" if packed == name else mode)})
    return folder / "packed"


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".TAR.GZ", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")],
)
def test_they_are_the_shards_unpacked(tmp_path: Path, suffix: str, mode: str) -> None:
    source = compressed(tmp_path, suffix, mode)
    (source / "classes.txt").write_text("".join(f"{name}\n" for name in miniature.SYNSETS))
    before = miniature.tree(source)
    prepare(source, tmp_path / "dest", num_workers=1)
    prepare(tmp_path / "plain", tmp_path / "other", num_workers=1)
    ours, theirs = (open_dataset(DataConfig(root=str(tmp_path / name))) for name in ("dest", "other"))
    assert np.array_equal(ours.train.names, theirs.train.names)
    assert [ours.val.read(i) for i in range(6)] == [theirs.val.read(i) for i in range(6)]
    assert ours.train.folder == tmp_path / "dest"
    assert miniature.tree(source) == before


def test_all_that_are_damaged_are_named(tmp_path: Path) -> None:
    source = compressed(tmp_path, ".tar.gz", "w:gz")
    damaged = sorted(source.rglob("*.tar.gz"))
    for file, content in zip(damaged, (damaged[0].read_bytes()[:-300], b"<html>"), strict=True):
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{damaged[0]} .*\(.*{damaged[1]} "):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest").exists()
    assert not list((tmp_path / "dest.unfinished").rglob(f"{damaged[0].name.removesuffix('.gz')}"))


def test_a_shard_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tar and a\.tar\.gz .*twice"):
        unpack(tmp_path, ["a.tar", "a.tar.gz"], tmp_path / "into", num_workers=1)


def test_they_are_unpacked_into_a_folder_of_their_own(tmp_path: Path) -> None:
    source = compressed(tmp_path, ".tar.gz", "w:gz")
    with pytest.raises(ValueError, match="something else"):
        prepare(source, source, num_workers=1)


JPEG = b"\xff\xd8\xff\xe0"


def pairs(names: Sequence[str], heads: dict[str, bytes] | None = None) -> tuple[list[tuple[str, str | None]], LeftOut]:
    omitted = LeftOut()
    members = [Member(name, index, 4) for index, name in enumerate(names)]
    found = samples(members, "the shard", omitted, lambda member: (heads or {}).get(member.name, b""))
    return [(sample.image.name, sample.label and sample.label.name) for sample in found], omitted


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.jpg", "0.cls"], [("0.jpg", "0.cls")]),
        (["0.cls", "0.JPEG"], [("0.JPEG", "0.cls")]),
        (["a/0.jpg", "b/0.cls", "b/0.jpg", "a/0.cls"], [("a/0.jpg", "a/0.cls"), ("b/0.jpg", "b/0.cls")]),
        (["v1.2/0.jpg", "v1.2/0.cls"], [("v1.2/0.jpg", "v1.2/0.cls")]),
        (["./0.jpg", "./0.cls"], [("./0.jpg", "./0.cls")]),
        (["0.image.jpg", "0.cls"], [("0.image.jpg", "0.cls")]),
        (["0.image.jpg", "0.target.cls", "0.json"], [("0.image.jpg", "0.json")]),
        (["p.1.jpg", "p.1.cls", "p.2.jpg", "p.2.json"], [("p.1.jpg", "p.1.cls"), ("p.2.jpg", "p.2.json")]),
        (["0.jpg", "0.json", "0.cls"], [("0.jpg", "0.cls")]),
        (["0.jpg"], [("0.jpg", None)]),
        (["é.jpe", "é.cls"], [("é.jpe", "é.cls")]),
    ],
)
def test_pairs(names: list[str], expected: list[tuple[str, str | None]]) -> None:
    found, omitted = pairs(names)
    assert found == expected
    assert set(omitted.counts) <= {left_out.NO_IMAGE}
    assert omitted.counts == ({left_out.NO_IMAGE: 1} if "0.target.cls" in names else {})


def test_content_says_what_a_suffix_does_not() -> None:
    found, omitted = pairs(["0.img", "0.cls", "1.bin", "1.cls"], {"0.img": JPEG, "1.bin": b"mp3"})
    assert found == [("0.img", "0.cls")]
    assert omitted.counts == {left_out.NO_IMAGE: 1}


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["1.cls"], {left_out.NO_IMAGE: 1}),
        (["1.json"], {left_out.NO_IMAGE: 1}),
        (["1.cls", "1.gif"], {left_out.NO_IMAGE: 1}),
        (["1.mp3"], {"files named *.mp3, not images that are read": 1}),
        (["0.png"], {left_out.DOUBLE: 1}),
        (["0.jpg"], {left_out.DOUBLE: 1}),
        (["0.cls"], {left_out.DOUBLE: 1}),
        (["0.seg.png", "0.depth.png"], {left_out.SIDE_IMAGE: 2}),
        (["1.left.jpg", "1.right.jpg"], {left_out.DOUBLE: 1}),
        (["p.1.jpg", "p.1.cls", "p.2.cls"], {left_out.NO_IMAGE: 1}),
        (["README", "a/b"], {left_out.NO_SUFFIX: 2}),
        ([".hidden.jpg", "a/.1.cls"], {left_out.HIDDEN: 2}),
        (["._0.jpg", "__MACOSX/0.jpg", "a/.DS_Store"], {left_out.SYSTEM: 3}),
        (["0.txt", "0.meta.json"], {}),
    ],
)
def test_what_belongs_to_no_sample_is_counted(names: list[str], counts: dict[str, int]) -> None:
    found, omitted = pairs(["0.jpg", "0.cls", *names])
    assert found[0] == ("0.jpg", "0.cls")
    assert omitted.counts == counts


def test_two_images_of_one_sample_are_named() -> None:
    _, omitted = pairs(["0.jpg", "0.png", "0.cls"])
    assert omitted.examples == {left_out.DOUBLE: "0.*: 0.jpg and 0.png in the shard"}
