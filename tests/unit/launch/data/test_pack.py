"""Pack: names, labels and order of the copy, what an interrupted one leaves, and what is refused."""

import fcntl
import io
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.launch.data import pack, packed_shards
from bitfleet.trainer.data import DataConfig, open_dataset
from bitfleet.trainer.data.manifest import list_bytes, read_manifest, write_quarantine
from tests.conftest import run_command
from tests.unit.conftest import contents, lists, prepare
from tests.unit.launch.data.test_packed_image import far_apart
from tests.unit.trainer.data.test_images import photo

# Packs, and dies when the file or shard that its last argument counts is about to be there.
DYING = """
import os, sys
from pathlib import Path
from bitfleet.trainer.data import unfinished
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
    with pytest.raises(ValueError, match=r"a/x\.png and .*a/x\.png\.JPEG would both become train/a/x\.png\.JPEG"):
        run(prepare(tmp_path / "data"), tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("form", ["files", "shards"])
@pytest.mark.usefixtures("small_shards")
def test_a_killed_pack_goes_on(source: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_shards, "_IMAGES_PER_SHARD", 1000)  # as in the process that is killed
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

    with pytest.raises(ValueError, match=r"packed\.unfinished was begun with other settings"):
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
    with pytest.raises(ValueError, match=r"cat\.0\.JPEG cannot be packed \(.*run bitfleet data verify"):
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
    with pytest.raises(ValueError, match=r"ant\.0\.JPEG cannot be packed \(No such file or directory\)"):
        run(root, tmp_path / "another", shards=shards)


@pytest.mark.usefixtures("small_shards")
def test_two_workers_write_what_one_does(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one")
    run(source, tmp_path / "two", num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_cannot_be_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="short_side=31 must be at least 32 pixels"):
        run(source, tmp_path / "packed", short_side=31)
    with pytest.raises(ValueError, match=r"has no manifest\.json.*bitfleet data prepare"):
        run(tmp_path, tmp_path / "packed")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine").touch()
    with pytest.raises(ValueError, match="there exists already"):
        run(source, tmp_path / "there")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/packed cannot be made \(.*give a place"):
        run(source, tmp_path / "file" / "packed")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"about 0\.0 GB and the disk of .*packed has 0\.0 GB free"):
        run(source, tmp_path / "packed")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}


def test_a_second_pack_into_the_same_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with open(tmp_path / "packed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is making .*packed"):
            run(source, tmp_path / "packed")
    run(source, tmp_path / "packed")
    assert list_bytes(lists(tmp_path / "packed")[0]).count(b"\n") == 25


def test_a_disk_that_is_full_is_a_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ValueError, match=r"ant\.0\.JPEG cannot be written \(No space left on device\).*goes on"):
            run(source, tmp_path / "packed")
    run(source, tmp_path / "packed")
