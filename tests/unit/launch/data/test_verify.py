"""Verify: what fails, what is only odd, and what is written about it."""

import io
import os
import re
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import Pipeline, fn, types
from PIL import Image, ImageCms

from bitfleet.launch.data import verify
from bitfleet.launch.data.manifest import write_manifest
from bitfleet.launch.data.pack import pack
from bitfleet.launch.data.prepare import prepare as prepare_command
from bitfleet.launch.data.verify import KINDS, oddities
from bitfleet.trainer.data import DataConfig, open_dataset, request
from bitfleet.trainer.data.image_list import read_manifest, read_quarantine
from tests import miniature
from tests.unit.conftest import contents, prepare
from tests.unit.trainer.data.odd_images import AS_RGB, CIELAB, write_odd_pixels, write_png, write_refused, write_tiff
from tests.unit.trainer.data.test_images import photo

Write = Callable[[Path], object]


def run(root: Path, num_workers: int = 1) -> tuple[str, int]:
    return verify.verify(root, num_workers=num_workers)


def rows(root: Path) -> dict[str, list[str]]:
    """Name -> kinds in verify.tsv."""
    header, *lines = os.fsdecode((root / "verify.tsv").read_bytes()).splitlines()
    assert header == "split\tpath\tkind\tdetail"
    kinds: dict[str, list[str]] = {}
    for line in lines:
        split, name, kind, detail = line.split("\t")
        assert name.startswith(f"{split}/")
        assert detail
        kinds.setdefault(name, []).append(kind)
    return kinds


def make(root: Path, write: Write) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            photo(30, 30).save(root / split / name / "0.jpg")
        write(root / split / "b")
    return prepare(root)


def write_many(folder: Path) -> None:
    for index in range(40):
        photo(40, 40, index).save(folder / f"{index:02d}.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow, when the images are listed
def test_odd_images_are_reported_and_stay(tmp_path: Path) -> None:
    root = make(tmp_path / "data", write_odd)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    report, num_failed = run(root)
    assert num_failed == 0
    assert rows(root) == {f"{split}/b/{name}": kinds for split in ("train", "val") for name, kinds in ODD.items()}
    assert read_quarantine(root) == {}
    assert "68 images decoded" in report
    assert "every image decodes" in report
    assert "6 of 16 bits a channel, read as 8: train/b/grey16.png, train/b/grey16.tif, train/b/rgb16.png, ..." in report
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in root.rglob("*") if path.is_file() and path not in before} == {
        "verify.tsv",
        "quarantine.tsv",
    }


def test_what_pillow_reads_leaves_no_line_of_dali(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "data", write_odd_pixels)
    (root / "train/b/0.jpg").write_bytes((root / "train/b/0.jpg").read_bytes()[:300])
    capfd.readouterr()
    report, num_failed = run(root)
    assert num_failed == 1
    assert list(read_quarantine(root)) == ["train/b/0.jpg"]
    assert capfd.readouterr() == ("", "")
    assert re.search(r"\d+ that DALI does not read or reads otherwise, read by Pillow with every loader", report)
    by_pillow = {name.rpartition("/")[2] for name, kinds in rows(root).items() if "pillow" in kinds}
    assert {"no_end.png", "rotated.webp", "555.bmp", "rgb10.ppm", "really_lzma_tiff.jpg", "lab.tif"} <= by_pillow
    assert not {"grey16.png", "cmyk.jpg", "several.webp", "rgba16.png", "rotated.jpg"} & by_pillow


def test_what_no_loader_reads_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    root = make(tmp_path / "data", write_refused)
    (tmp_path / "reasons").mkdir()
    reasons = write_refused(tmp_path / "reasons")
    report, num_failed = run(root)
    quarantine = read_quarantine(root)
    assert num_failed == len(quarantine) == 2 * len(reasons)
    for name, reason in reasons.items():
        assert re.search(rf"cannot be decoded \(.*{reason}", quarantine[f"val/b/{name}"])
        assert f"val/b/{name}: cannot be decoded" in report
    dataset = open_dataset(DataConfig(root=str(root)))
    assert len(dataset.train) == len(dataset.val) == 2


def test_large_images_are_decoded_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "data", write_many)
    counts, decode = [], verify.WholeDecoder.decoded
    monkeypatch.setattr(request, "MOST_BYTES", 3 * 40 * 40 * 5)
    monkeypatch.setattr(
        verify.WholeDecoder, "decoded", lambda self, encoded: counts.append(len(encoded)) or decode(self, encoded)
    )
    assert run(root)[1] == 0
    assert sum(counts) == 84
    assert max(counts) == 5


def become(form: str) -> Write:
    return lambda path: photo(40, 40).save(path, format=form)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lose_tail(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def comment(path: Path) -> None:
    """The same pixels in more bytes."""
    jpeg = path.read_bytes()
    path.write_bytes(jpeg[:2] + b"\xff\xfe\x00\x06abcd" + jpeg[2:])


DAMAGES: list[tuple[Write, str, str]] = [
    (cut, "broken", r"cannot be decoded \(Truncated File Read\); changed since prepare: [\d,]+ bytes instead of"),
    (lose_tail, "broken", r"cannot be decoded \(image file is truncated"),
    (Path.unlink, "missing", "the file is missing"),
    (lambda path: path.write_bytes(b""), "broken", "cannot be decoded .the file is empty"),
    (lambda path: path.write_text("<html>"), "broken", "cannot be decoded .it is not an image"),
    (become("GIF"), "broken", "it is a GIF file, which bitfleet does not read"),
    (lambda path: photo(39, 40).save(path), "changed", "^changed since prepare: 40 x 39 pixels instead of 40 x 40, "),
    (comment, "changed", r"^changed since prepare: ([\d,]+) bytes instead of [\d,]+$"),
]


@pytest.mark.parametrize(("damage", "kind", "reason"), DAMAGES)
def test_what_fails_is_set_aside_until_it_is_repaired(tmp_path: Path, damage: Write, kind: str, reason: str) -> None:
    root = make(tmp_path / "data", write_many)
    path, name = root / "val/b/17.jpg", "val/b/17.jpg"
    good = path.read_bytes()
    damage(path)
    report, num_failed = run(root)
    assert num_failed == 1
    assert rows(root)[name][0] == kind
    ((failed, said),) = read_quarantine(root).items()
    assert failed == name
    assert re.search(reason, said)
    assert f"1 failed:\n  {name}: {said}" in report
    assert "no file was deleted" in report
    dataset = open_dataset(DataConfig(root=str(root)))
    assert dataset.num_quarantined == 1
    assert name not in {dataset.val.name(index) for index in range(len(dataset.val))}

    path.write_bytes(good)
    assert run(root)[1] == 0
    assert read_quarantine(root) == {}
    assert name not in rows(root)
    assert open_dataset(DataConfig(root=str(root))).num_quarantined == 0


def test_a_truncated_file_is_caught_though_a_crop_of_it_decodes(tmp_path: Path) -> None:
    root = make(tmp_path / "data", lambda folder: photo(200, 200).save(folder / "1.jpg"))
    path = root / "train/b/1.jpg"
    cut(path)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        encoded = fn.external_source(source=[[np.fromfile(path, np.uint8)]], cycle=True)
        window = fn.decoders.image_slice(encoded, start=[0, 0], end=[16, 16], axes=[0, 1], output_type=types.RGB)
        pipeline.set_outputs(window)
    assert pipeline.run()[0].shape() == [(16, 16, 3)]
    assert run(root)[1] == 1
    assert list(read_quarantine(root)) == ["train/b/1.jpg"]


def test_many_broken_images_take_a_decode_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "data", write_many)
    broken = [path for path in sorted(root.glob("train/b/*.jpg")) if path.name != "05.jpg"]
    for path in broken:
        path.write_bytes(b"no image")
    counts, decode = [], verify._run
    monkeypatch.setattr(verify, "_run", lambda *arguments: counts.append(1) or decode(*arguments))
    report, num_failed = run(root)
    assert num_failed == len(broken) == 40
    assert list(read_quarantine(root)) == [str(path.relative_to(root)) for path in broken]
    assert len(counts) <= 84 + 84 / verify.BATCH_SIZE + 2
    assert report.count("not an image") == 20
    assert "and 20 more" in report
    assert "no image left" not in report


def test_classes_without_an_image_are_said_loudly(tmp_path: Path) -> None:
    root = make(tmp_path / "data", write_many)
    (root / "val/a/0.jpg").unlink()
    assert "WARNING: 1 classes have no image left in val: a\n" in run(root)[0]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow, when the images are listed
def test_two_workers_write_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "data", write_odd)
    name = os.fsencode(root / "train/b/") + b"/\xff.jpg"
    shutil.copy(root / "train/b/grey.JPEG", name)
    prepare(root)
    os.truncate(name, 300)
    monkeypatch.setattr(verify, "_JOB_IMAGES", 7)
    reports = []
    for num_workers in (1, 2):
        report, num_failed = run(root, num_workers)
        assert num_failed == 1
        assert "train/b/\\udcff.jpg: cannot be decoded" in report
        lists = [(root / file).read_bytes() for file in ("verify.tsv", "quarantine.tsv")]
        reports.append((report.split("\n", 1)[1], lists))
    assert reports[0] == reports[1]


def test_an_interrupt_leaves_the_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "data", write_many)
    (root / "val/b/17.jpg").unlink()
    run(root)
    before = read_quarantine(root)
    (root / "val/b/18.jpg").unlink()
    decode, calls = verify._verify_job, []

    def interrupted(job: verify._Job) -> list[verify.Finding]:
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(job)

    monkeypatch.setattr(verify, "_verify_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root)
    assert read_quarantine(root) == before
    assert len(rows(root)) == 1


def test_images_in_shards(tmp_path: Path) -> None:
    make(tmp_path / "data", write_many)
    root = tmp_path / "shards"
    pack(tmp_path / "data", root, short_side=32, shards=True, num_workers=1)
    assert run(root)[1] == 0
    train = read_manifest(root)[0].train
    assert train.offsets is not None
    with open(root / "train/000000.tar", "r+b") as shard:
        shard.seek(int(train.offsets[5]))
        shard.write(b"nonsense")
    (root / "val/000000.tar").unlink()
    report, num_failed = run(root)
    quarantine = read_quarantine(root)
    assert num_failed == len(quarantine) == 1 + 42
    assert "cannot be decoded" in quarantine[train.name(5)]
    assert list(quarantine.values()).count("the file is missing") == 42
    assert "WARNING: 2 classes have no image left in val: a, b\n" in report


def test_a_folder_that_was_never_prepared_is_listed_and_decoded(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
        write_many(root / split / "a")
        photo(40, 40).save(root / split / "b/0.jpg")
    (root / "train/a/notes.txt").touch()
    before = contents(root)
    report, num_failed = run(root)
    assert num_failed == 0
    assert "every image decodes\nnot listed, and so not decoded: train: 1 text or annotations" in report
    for index in range(25):
        cut(root / f"train/a/{index:02d}.jpg")
    (root / "val/a/03.jpg").write_bytes(b"")
    (root / "val/a/04.jpg").unlink()
    (root / "val/a/04.jpg").symlink_to("nowhere")
    (root / "val/a/05.jpg").rename(root / "val/a/.05.jpg")
    report, num_failed = run(root)
    assert num_failed == 27 + 1  # and the fault
    assert report.count("cannot be decoded (Truncated File Read)") == 25
    assert "val/a/03.jpg: cannot be decoded (the file is empty)" in report
    assert "val/a/04.jpg: the file is missing" in report
    assert "nothing is set aside, since" in report
    assert "INCOMPLETE: not listed from val in" in report
    names = {str(path.relative_to(root)) for path in root.rglob("*")}
    assert names == {*before, "val/a/04.jpg", "val/a/.05.jpg", *FOLDERS} - {"val/a/05.jpg"}


FOLDERS = {"train", "val", "train/a", "train/b", "val/a", "val/b"}


def test_shards_that_were_never_prepared(tmp_path: Path, miniature_counts: None) -> None:
    report, num_failed = run(miniature.shards(tmp_path))
    assert num_failed == 0
    assert "18 images decoded" in report


def test_what_prepare_set_aside_stays_aside(tmp_path: Path) -> None:
    root = make(tmp_path / "data", write_many)
    (root / "train/b/00.jpg").write_bytes(b"?")
    prepare_command(root, root, num_workers=1, quarantine=True)
    assert run(root)[1] == 1
    assert list(read_quarantine(root)) == ["train/b/00.jpg"]
    photo(40, 40).save(root / "train/b/00.jpg")
    assert "40 x 40 pixels instead of 0 x 0" in run(root)[0]  # its window could not be taken
    prepare_command(root, root, num_workers=1)
    assert run(root)[1] == 0
    assert read_quarantine(root) == {}


def test_what_is_no_data_set_is_refused(tmp_path: Path, miniature_counts: None) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json .*bitfleet data prepare.*looked for"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"archives .*bitfleet data prepare"):
        run(miniature.archives(tmp_path))


def test_folders_that_are_not_there_or_not_writable_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "data", write_many)
    apart = tmp_path / "apart"
    apart.mkdir()
    write_manifest(read_manifest(root)[0], apart)
    assert run(apart)[1] == 0
    assert (apart / "quarantine.tsv").exists()
    assert not (root / "quarantine.tsv").exists()

    root.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{apart} .* {root}, .*not there"):
        run(apart)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=f"{apart} .*written"):
        run(apart)


def test_ycck_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "ycck.jpg"
    photo(40, 36).convert("CMYK").save(path)
    become_ycck(path)
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        theirs = np.asarray(image.convert("RGB"))
    (ours,) = verify._build(1).run(encoded=[np.fromfile(path, np.uint8)])
    np.testing.assert_array_equal(ours.as_array()[0], theirs)


def sixteen_bit_rgb_png(path: Path) -> None:
    write_png(path, np.random.default_rng(0).integers(0, 65536, (40, 36, 3), dtype=np.uint16), 2)


def become_ycck(path: Path) -> None:
    jpeg = bytearray(path.read_bytes())
    transform = jpeg.index(b"Adobe") + 11
    assert jpeg[transform] == 0
    jpeg[transform] = 2
    path.write_bytes(jpeg)


def write_odd(folder: Path) -> None:
    """One of each kind of odd image that training reads."""
    image = photo(40, 36)
    image.save(folder / "plain.JPEG")
    image.save(folder / "progressive.jpg", progressive=True)
    photo(1, 1).save(folder / "one_pixel.jpg")
    image.convert("L").save(folder / "grey.JPEG")
    image.convert("CMYK").save(folder / "cmyk.JPEG")
    image.convert("CMYK").save(folder / "ycck.JPEG")
    become_ycck(folder / "ycck.JPEG")
    image.save(folder / "really_a_png.JPEG", format="PNG")
    image.save(folder / "really_a_bmp.JPEG", format="BMP")
    image.save(folder / "really_a_jpeg.png", format="JPEG")
    image.convert("P").save(folder / "palette.png")
    image.convert("P").save(folder / "clear_palette.png", transparency=bytes(range(256)))
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("LA").save(folder / "grey_alpha.png")
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(wide).save(folder / "grey16.png")
    Image.fromarray(wide).save(folder / "grey16.tif")
    sixteen_bit_rgb_png(folder / "rgb16.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.jpg", exif=exif)
    image.save(folder / "rotated.webp", exif=exif)
    exif[0x0112] = 1
    image.save(folder / "upright.jpg", exif=exif)
    write_tiff(folder / "lab.tif", np.zeros((40, 36, 3), np.uint8), CIELAB)
    write_tiff(folder / "planes.tif", np.asarray(image), AS_RGB, planes=True)
    image.save(folder / "turned.tif", tiffinfo={0x0112: 3})
    image.save(folder / "several.png", save_all=True, append_images=[photo(40, 36, 1)])
    image.save(folder / "phone.jpg", "MPO", save_all=True, append_images=[photo(40, 36, 1)])
    photo(1, 25).save(folder / "long.png")
    photo(1, 24).save(folder / "not_long.png")
    image.save(folder / "srgb.jpg", icc_profile=profile("sRGB"))
    image.save(folder / "lab_profile.jpg", icc_profile=profile("LAB"))
    write_png(folder / "linear.png", np.asarray(image), 2, 8, [(b"gAMA", struct.pack(">I", 100_000))])
    write_png(folder / "srgb_gamma.png", np.asarray(image), 2, 8, [(b"gAMA", struct.pack(">I", 45_455))])
    image.save(folder / "no_end.png")
    (folder / "no_end.png").write_bytes((folder / "no_end.png").read_bytes()[:-12])
    image.save(folder / "broken_exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03")


ODD = {
    "grey.JPEG": ["grey"],
    "cmyk.JPEG": ["cmyk"],
    "ycck.JPEG": ["ycck"],
    "really_a_png.JPEG": ["format"],
    "really_a_bmp.JPEG": ["pillow", "format"],
    "really_a_jpeg.png": ["format"],
    "palette.png": ["palette"],
    "clear_palette.png": ["palette", "alpha"],
    "alpha.png": ["alpha"],
    "grey_alpha.png": ["grey", "alpha"],
    "grey16.png": ["grey", "16-bit"],
    "grey16.tif": ["grey", "16-bit", "pillow"],
    "rgb16.png": ["16-bit"],
    "rotated.jpg": ["rotated"],
    "rotated.webp": ["rotated"],
    "lab.tif": ["colour", "pillow"],
    "planes.tif": ["pillow"],
    "turned.tif": ["turned", "pillow"],
    "several.png": ["frames"],
    "phone.jpg": ["frames"],
    "long.png": ["long"],
    "lab_profile.jpg": ["profile"],
    "linear.png": ["profile"],
    "no_end.png": ["pillow"],
}


def test_every_kind_is_told_from_the_header(tmp_path: Path) -> None:
    write_odd(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the broken EXIF
        found = {
            path.name: oddities(path.read_bytes(), path.name, by_pillow="pillow" in ODD.get(path.name, ()))
            for path in tmp_path.iterdir()
        }
    assert {name: [kind for kind, _ in kinds] for name, kinds in found.items() if kinds} == ODD
    assert {kind for kinds in found.values() for kind, _ in kinds} == set(KINDS) - {"large"}
    assert found["rotated.jpg"] == [("rotated", "orientation 6")]
    assert found["phone.jpg"] == [("frames", "MPO, 2 pictures")]
    assert found["linear.png"] == [("profile", "PNG, gamma 1")]
    assert found["long.png"] == [("long", "25 x 1 pixels")]
    assert found["really_a_png.JPEG"] == [("format", "PNG named .JPEG")]


def test_a_large_image_is_told_without_decoding_it() -> None:
    def ppm(side: int) -> bytes:
        return b"P6 %d %d 255\n" % (side, side)

    assert oddities(ppm(9_459), "a.ppm") == []
    assert oddities(ppm(9_460), "a.ppm") == [("large", "9460 x 9460 pixels")]


def profile(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()  # type: ignore[arg-type]


def test_what_pillow_does_not_know_has_no_oddity() -> None:
    assert oddities(b"<html>", "page.jpg") == []
