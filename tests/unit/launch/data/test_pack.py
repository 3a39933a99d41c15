"""Pack: names, labels and order of the copy, what an interrupted one leaves, and what is
refused."""

import fcntl
import io
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from bitfleet.launch.data import pack
from bitfleet.launch.data.manifest import write_manifest, write_quarantine
from bitfleet.launch.data.pack import packed_image, packed_size
from bitfleet.trainer.data import DataConfig, open_dataset
from bitfleet.trainer.data.image_list import ImageList, Manifest, list_bytes, read_manifest, shard_and_member
from tests.conftest import run_command
from tests.unit.conftest import contents, lists, prepare
from tests.unit.launch.data.test_verify import become_ycck, sixteen_bit_rgb_png
from tests.unit.trainer.data.test_images import photo

# Packs, and dies when the file or shard that its last argument counts is about to be there.
DYING = """
import os, sys
from pathlib import Path
from bitfleet.launch.data.pack import pack
rename, left = Path.rename, [int(sys.argv[4])]
def dying(path, target):
    left[0] -= path.name.startswith(".tmp-")
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return rename(path, target)
Path.rename = dying
pack(Path(sys.argv[1]), Path(sys.argv[2]), short_side=48, shards=sys.argv[3] == "shards", num_workers=1)
"""


def run(root: Path, dest: Path, *, short_side: int = 48, shards: bool = False, num_workers: int = 1) -> str:
    return pack.pack(root, dest, short_side=short_side, shards=shards, num_workers=num_workers)


def test_files_keep_labels_order_and_names(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    before = contents(source)
    summary = run(source, dest)
    assert contents(source) == before
    manifest, _ = read_manifest(dest)
    original, sha = read_manifest(source)
    assert manifest.classes == original.classes == ("ant", "bee", "cat")
    assert manifest.facts == {"packed": {"short_side": 48, "quality": 90, "of": sha}}
    assert manifest.layout == original.layout
    for ours, theirs in ((manifest.train, original.train), (manifest.val, original.val)):
        assert [ours.name(i) for i in range(24)] == [theirs.name(i).replace(".png", ".JPEG") for i in range(24)]
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        for index in range(24):
            encoded = ours.read(index)
            assert len(encoded) == ours.sizes[index] == Path(ours.path(index)).stat().st_size
            with Image.open(io.BytesIO(encoded)) as image:
                assert image.format == "JPEG"
                assert image.size == (ours.widths[index], ours.heights[index])
            assert min(image.size) <= 48
    sizes = zip(manifest.train.heights[:8].tolist(), manifest.train.widths[:8].tolist(), strict=True)
    assert list(sizes) == [(48, 64), (72, 48), (48, 188), (48, 48), (40, 300), (47, 61), (33, 30), (48, 48)]
    names = {manifest.train.name(i) for i in range(24)} | {manifest.val.name(i) for i in range(24)}
    assert set(contents(dest)) == names | {"manifest.json", "train.tsv", "val.tsv"}
    assert list(tmp_path.iterdir()) == [dest]
    assert summary.startswith(f"{dest}: 48 images, ")

    dataset = open_dataset(DataConfig(root=str(dest), image_size=32))
    assert (len(dataset.train), len(dataset.val), dataset.num_quarantined) == (24, 24, 0)


def test_pixels_are_those_of_pillow(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "packed")
    for ours, theirs in zip(lists(tmp_path / "packed"), lists(source), strict=True):
        for index in range(24):
            with Image.open(ours.path(index)) as image, Image.open(theirs.path(index)) as original:
                if min(original.size) <= 48 and original.format == "JPEG":
                    assert ours.read(index) == theirs.read(index)
                    continue
                reference = original.resize(image.size, Image.Resampling.BICUBIC)
                assert far_apart(image, reference) < 2
                assert "comment" not in image.info
            jpeg = io.BytesIO()
            reference.save(jpeg, "JPEG", quality=90, subsampling="4:2:0", comment=b"")
            assert ours.read(index) == jpeg.getvalue()


def test_names_that_would_meet_are_kept_apart(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for name in ("x.JPEG", "x.png", "x.bmp", "y.jpg", "z.webp"):
            photo(40, 40).save(tmp_path / "data" / split / "a" / name)
    run(prepare(tmp_path / "data"), tmp_path / "packed")
    train, _ = lists(tmp_path / "packed")
    names = [train.name(i).removeprefix("train/a/") for i in range(5)]
    assert names == ["x.JPEG", "x.bmp.JPEG", "x.png.JPEG", "y.jpg", "z.JPEG"]


def test_names_that_meet_all_the_same_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for name in ("x.JPEG", "x.png", "x.png.JPEG"):
            photo(40, 40).save(tmp_path / "data" / split / "a" / name)
    with pytest.raises(ValueError, match=r"a/x\.png and .*a/x\.png\.JPEG .* train/a/x\.png\.JPEG"):
        run(prepare(tmp_path / "data"), tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("form", ["files", "shards"])
@pytest.mark.usefixtures("small_shards")
def test_a_killed_pack_goes_on(source: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_IMAGES_PER_SHARD", 1000)  # as in the process that is killed
    dest, count = tmp_path / "packed", 30 if form == "files" else 1
    command = [sys.executable, "-c", DYING, str(source), str(dest), form, str(count)]
    assert run_command(command).returncode == -signal.SIGKILL
    unfinished = tmp_path / "packed.unfinished"
    assert not dest.exists()
    done = {
        path: path.stat().st_ino
        for path in unfinished.glob("*/**/*")
        if path.is_file() and not path.name.startswith(".tmp-")
    }
    assert len(done) == count
    assert len(list(unfinished.rglob(".tmp-*"))) == 1  # what was being written

    with pytest.raises(ValueError, match=r"packed\.unfinished .*other settings"):
        run(source, dest, short_side=40, shards=form == "shards")
    torn, *_ = done
    torn.write_bytes(torn.read_bytes()[:10] if form == "files" else torn.read_bytes()[:5000])
    run(source, dest, shards=form == "shards")
    kept = [path for path, inode in done.items() if (dest / path.relative_to(unfinished)).stat().st_ino == inode]
    assert kept == list(done)[1:]
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    run(source, tmp_path / "whole", shards=form == "shards")
    assert contents(dest) == contents(tmp_path / "whole")


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.usefixtures("small_shards")
def test_a_broken_image_stops_it_and_a_quarantine_lets_it_go_on(source: Path, tmp_path: Path, shards: bool) -> None:
    root, dest = tmp_path / "data", tmp_path / "packed"
    shutil.copytree(source, root)
    for name in ("train/cat/cat.0.JPEG", "val/bee/bee.1.JPEG"):
        os.truncate(root / name, 900)
    with pytest.raises(ValueError, match=r"cat\.0\.JPEG .*\(.*bitfleet data verify"):
        run(root, dest, shards=shards)
    # One that was packed already is set aside, too.
    write_quarantine(root, dict.fromkeys(["train/ant/ant.3.JPEG", "train/cat/cat.0.JPEG", "val/bee/bee.1.JPEG"], "bad"))
    assert run(root, dest, shards=shards).endswith("3 quarantined images are left out")
    run(root, tmp_path / "whole", shards=shards)
    assert contents(dest) == contents(tmp_path / "whole")
    (train, val), (all_train, _) = lists(dest), lists(source)
    assert (len(train), len(val)) == (22, 23)
    np.testing.assert_array_equal(train.labels, np.delete(all_train.labels, [3, 16]))
    (root / "train/ant/ant.0.JPEG").unlink()
    with pytest.raises(ValueError, match=r"ant\.0\.JPEG .*\(No such file or directory\)"):
        run(root, tmp_path / "another", shards=shards)


@pytest.mark.usefixtures("small_shards")
def test_two_workers_write_what_one_does(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one")
    run(source, tmp_path / "two", num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_cannot_be_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="short_side=31 .* 32"):
        run(source, tmp_path / "packed", short_side=31)
    with pytest.raises(ValueError, match=r"has no manifest\.json.*bitfleet data prepare"):
        run(tmp_path, tmp_path / "packed")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine").touch()
    with pytest.raises(ValueError, match="there exists"):
        run(source, tmp_path / "there")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/packed .*\("):
        run(source, tmp_path / "file" / "packed")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"0\.0 GB .*packed has 0\.0 GB free"):
        run(source, tmp_path / "packed")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}


@pytest.mark.parametrize("kind", ["link", "mount point"])
def test_an_empty_folder_that_cannot_be_replaced_is_refused_before_anything_is_written(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest, disk = tmp_path / "dest", tmp_path / "disk"
    disk.mkdir()
    if kind == "link":
        dest.symlink_to(disk)
    else:
        dest.mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: path == dest)
    with pytest.raises(ValueError, match=f"{dest} is a {kind}, .* a new name in it"):
        run(source, dest)
    assert not (tmp_path / "dest.unfinished").exists()
    run(source, dest / "new")
    assert read_manifest(dest / "new")[0].train


def test_a_second_pack_into_the_same_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with open(tmp_path / "packed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process .*packed"):
            run(source, tmp_path / "packed")
    run(source, tmp_path / "packed")
    assert list_bytes(lists(tmp_path / "packed")[0]).count(b"\n") == 25


def test_a_disk_that_is_full_is_a_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ValueError, match=r"ant\.0\.JPEG .*\(No space left on device\)"):
            run(source, tmp_path / "packed")
    run(source, tmp_path / "packed")


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (333, 499), (256, 2000), (900, 257), (257, 257)])
def test_sizes_are_those_of_torchvision(size: tuple[int, int]) -> None:
    resized = functional.resize(Image.new("L", size[::-1]), 256)
    assert packed_size(*size, 256) == (resized.height, resized.width)


@pytest.mark.parametrize("size", [(256, 300), (255, 300), (3, 5000), (1, 1)])
def test_what_is_not_larger_keeps_its_size(size: tuple[int, int]) -> None:
    assert packed_size(*size, 256) == size


class Odd(NamedTuple):
    name: str
    mode: str
    save: Callable[[Image.Image, Path], None]
    """Save a photo."""
    look: Callable[[Image.Image], Image.Image]
    """Return the expected packed photo."""


def as_grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def save_grey16(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def save_rotated(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def save_ycck(image: Image.Image, path: Path) -> None:
    image.convert("CMYK").save(path, quality=98)
    become_ycck(path)


def far_apart(packed: Image.Image, reference: Image.Image) -> float:
    """Return the difference of two images, seen from some distance: JPEG loses colour detail."""
    return float(np.abs(np.asarray(packed.reduce(4)).astype(int) - np.asarray(reference.reduce(4))).mean())


ODD = [
    Odd("grey.JPEG", "L", lambda image, path: as_grey(image).save(path), as_grey),
    Odd("grey.png", "L", lambda image, path: as_grey(image).save(path), as_grey),
    Odd("grey_alpha.png", "L", lambda image, path: image.convert("LA").save(path), as_grey),
    Odd("grey16.png", "L", save_grey16, as_grey),
    Odd("grey16.tif", "L", save_grey16, as_grey),
    Odd("bilevel.png", "L", lambda image, path: image.convert("1").save(path), lambda image: image.convert("1")),
    Odd("cmyk.JPEG", "RGB", lambda image, path: image.convert("CMYK").save(path), lambda image: image),
    Odd("png.JPEG", "RGB", lambda image, path: image.save(path, "PNG"), lambda image: image),
    Odd("alpha.png", "RGB", lambda image, path: image.convert("RGBA").save(path), lambda image: image),
    Odd("palette.png", "RGB", lambda image, path: image.convert("P").save(path), lambda image: image.convert("P")),
    Odd("rotated.JPEG", "RGB", save_rotated, lambda image: image),
    Odd("image.webp", "RGB", lambda image, path: image.save(path, lossless=True), lambda image: image),
]


@pytest.mark.parametrize("short_side", [60, 90, 100])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_odd_images_become_what_training_sees(tmp_path: Path, odd: Odd, short_side: int) -> None:
    path, image = tmp_path / odd.name, photo(90, 120)
    odd.save(image, path)
    encoded = path.read_bytes()
    jpeg, height, width = packed_image(encoded, short_side)
    if short_side >= 90 and "JPEG" in odd.name and odd.name != "png.JPEG":
        assert jpeg == encoded
        return
    with Image.open(io.BytesIO(jpeg)) as packed:
        assert (packed.format, packed.mode) == ("JPEG", odd.mode)
        assert (packed.height, packed.width) == (height, width) == ((60, 80) if short_side == 60 else (90, 120))
        assert 0x0112 not in packed.getexif()
        reference = odd.look(image).convert(odd.mode).resize((width, height), Image.Resampling.BICUBIC)
        assert far_apart(packed, reference) < 3


def test_sixteen_bit_colour_and_ycck(tmp_path: Path) -> None:
    sixteen_bit_rgb_png(tmp_path / "16.png")
    jpeg, _, _ = packed_image((tmp_path / "16.png").read_bytes(), 32)
    with Image.open(io.BytesIO(jpeg)) as packed:
        assert (packed.mode, packed.size) == ("RGB", (32, 35))
    save_ycck(photo(90, 120), tmp_path / "ycck.jpg")
    with Image.open(tmp_path / "ycck.jpg") as image:
        reference = image.convert("RGB").resize((80, 60), Image.Resampling.BICUBIC)
    jpeg, _, _ = packed_image((tmp_path / "ycck.jpg").read_bytes(), 60)
    with Image.open(io.BytesIO(jpeg)) as packed:
        assert packed.mode == "RGB"
        assert far_apart(packed, reference) < 3


def test_a_range_of_brightness_that_is_not_known_is_refused() -> None:
    tiff = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)).save(tiff, "TIFF")
    with pytest.raises(ValueError, match="mode F"):
        packed_image(tiff.getvalue(), 32)


@pytest.mark.usefixtures("small_shards")
def test_shards_hold_what_files_do(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "files")
    run(source, tmp_path / "shards", shards=True)
    assert set(contents(tmp_path / "shards")) == {
        *(f"{split}/{shard:06d}.tar" for split in ("train", "val") for shard in range(5)),
        *("manifest.json", "train.tsv", "val.tsv", "classes.txt"),
    }
    assert (tmp_path / "shards/classes.txt").read_text() == "ant\nbee\ncat\n"
    for ours, theirs in zip(lists(tmp_path / "shards"), lists(tmp_path / "files"), strict=True):
        assert ours.offsets is not None
        for column in ("labels", "heights", "widths", "sizes"):
            np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))
        for index in range(24):
            shard, member = shard_and_member(ours.name(index))
            key, suffix = member.split(".")
            assert key.startswith(f"{index:07d}-")
            assert suffix == "jpg"
            with tarfile.open(ours.folder / shard) as tar:
                image, label = tar.extractfile(member), tar.extractfile(f"{key}.cls")
                assert image is not None
                assert label is not None
                assert image.read() == ours.read(index) == theirs.read(index)
                assert int(label.read()) == ours.labels[index]
                assert tar.getmember(member).offset_data == ours.offsets[index]
                assert {info.mtime for info in tar} == {0}
    dataset = open_dataset(DataConfig(root=str(tmp_path / "shards")))
    assert dataset.train.read(23) == lists(tmp_path / "files")[0].read(23)


def test_a_shard_ends_before_it_is_too_large(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    monkeypatch.setattr(pack, "_IMAGES_PER_SHARD", 4)
    monkeypatch.setattr(pack, "_BYTES_PER_SHARD", 100)
    train, _ = lists(source)
    sizes = np.array([10] * 6 + [60, 40, 1, 500, 1] + [10] * 13, np.int64)
    names = pack.shard_names(train, "train", sizes)
    shards = [int(name[6:12]) for name in names]
    assert shards[:14] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4]


@pytest.mark.usefixtures("small_shards")
def test_packed_again(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "shards", short_side=48, shards=True)
    run(source, tmp_path / "files", short_side=48)
    for first in ("shards", "files"):
        for shards in (False, True):
            dest = tmp_path / f"{first}-{shards}"
            run(tmp_path / first, dest, short_side=32, shards=shards)
            again = read_manifest(dest)[0]
            assert again.facts["packed"] == {
                "short_side": 32,
                "quality": 90,
                "of": read_manifest(tmp_path / first)[1],
            }
            for ours, theirs in zip((again.train, again.val), lists(source), strict=True):
                np.testing.assert_array_equal(ours.labels, theirs.labels)
                assert ours.heights[:3].tolist() == [32, 48, 32]
    train, _ = lists(tmp_path / "shards-False")
    assert train.name(8) == "train/bee/0000008-bee_0.jpg"
    pixels = {
        tuple(lists(tmp_path / f"{first}-{shards}")[0].read(index) for index in range(24))
        for first in ("shards", "files")
        for shards in (False, True)
    }
    assert len(pixels) == 1


def test_shards_of_others_become_class_folders(source: Path, tmp_path: Path) -> None:
    """Keys that are unique in their shard only, members in folders, and class names that no folder
    can have."""
    originals = lists(source)
    packed: list[ImageList] = []
    for split, images in zip(("train", "val"), originals, strict=True):
        (tmp_path / "wds" / split).mkdir(parents=True)
        names, offsets = [], []
        for number in range(2):
            file = tmp_path / "wds" / split / f"{number}.tar"
            with tarfile.open(file, "w") as tar:
                for index in range(2):
                    info = tarfile.TarInfo(f"deep/{index}.jpg")
                    info.size = int(images.sizes[index])
                    tar.addfile(info, io.BytesIO(images.read(index)))
            with tarfile.open(file) as tar:
                names += [f"{split}/{number}.tar/{info.name}" for info in tar]
                offsets += [info.offset_data for info in tar]
        part = images.select(np.array([0, 1, 0, 1]))
        packed.append(
            ImageList(
                folder=tmp_path / "wds",
                names=np.array([os.fsencode(name) for name in names]),
                labels=np.array([0, 1, 0, 2], np.int64),
                heights=part.heights,
                widths=part.widths,
                sizes=part.sizes,
                offsets=np.array(offsets, np.int64),
            )
        )
    train, val = packed
    write_manifest(
        Manifest(train=train, val=val, classes=("great white", "cock/hen", ".x"), layout="WebDataset"), tmp_path / "wds"
    )
    run(tmp_path / "wds", tmp_path / "packed")
    train, _ = lists(tmp_path / "packed")
    assert [train.name(index) for index in range(4)] == [
        "train/great white/0.jpg",
        "train/class1/1.jpg",
        "train/great white/1-0.jpg",
        "train/class2/1.jpg",
    ]
    with Image.open(train.path(3)) as image:
        assert image.size == (48, 72)
