"""Pixels of every odd kind of image: the right ones, with every loader, or a refusal that names the
image."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, dali, open_dataset
from bitfleet.trainer.data.decoding import decode
from tests.unit.trainer.data.odd_images import GREY, RGB, write_odd_pixels, write_refused
from tests.unit.trainer.data.test_images import photo

LOADERS = ("dali", "torch", "memory")
ONE_RANK: Any = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": torch.device("cpu")}
WHOLE = DataConfig(image_size=36, crop_padding=0, flip=False, num_threads=2, val_batch_size=16)
RESIZED = DataConfig(augmentation="random_resized_crop", image_size=28, num_threads=2, val_batch_size=16)
COARSE = {"ycbcr.tif": 2, "555.bmp": 4, "565.bmp": 4, "really_565_bmp.jpg": 4}
"""Mean difference that the format itself makes, of 255; for all others 1."""

Given = dict[str, npt.NDArray[np.int64]]


class Odd:
    """One data set of all odd images: what is right, and what each loader gives."""

    def __init__(self, root: Path) -> None:
        (root / "train/a").mkdir(parents=True)
        self.right = write_odd_pixels(root / "train/a")
        (root / "val").symlink_to(root / "train")
        self.root, self._given = root, {}  # type: ignore[var-annotated]

    def given(self, config: DataConfig, loader: str) -> Given:
        config = dataclasses.replace(config, root=str(self.root), loader=loader)  # type: ignore[arg-type]
        if config not in self._given:
            dataset = open_dataset(config)
            batches = list(ValidationLoader(dataset, config, **ONE_RANK))
            images = np.concatenate([images.numpy() for images, _ in batches]).astype(np.int64)
            names = [dataset.val.name(index).rpartition("/")[2] for index in range(len(dataset.val))]
            self._given[config] = dict(zip(names, images, strict=True))
        given: Given = self._given[config]
        return given


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Odd]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Odd(tmp_path_factory.mktemp("odd"))


@pytest.mark.parametrize("loader", LOADERS)
def test_every_kind_has_the_right_pixels(odd: Odd, loader: str) -> None:
    given = odd.given(WHOLE, loader)
    assert set(given) == set(odd.right)
    wrong = {}
    for name, right in odd.right.items():
        theirs = np.broadcast_to(right.reshape(40, 36, -1), (40, 36, 3))[2:38]
        difference = float(np.abs(given[name] - theirs).mean())
        if difference > COARSE.get(name, 1):
            wrong[name] = difference
    assert not wrong


@pytest.mark.parametrize("config", [WHOLE, RESIZED, dataclasses.replace(RESIZED, preprocessing="official")])
def test_loaders_agree(odd: Odd, config: DataConfig) -> None:
    dali, pillow, memory = (odd.given(config, loader) for loader in LOADERS)
    for name in odd.right:
        # TensorFlow's fast transform of JPEGs is DALI's alone.
        furthest = 2 if config.preprocessing == "official" and name.endswith(".jpg") else 1
        assert np.abs(dali[name] - pillow[name]).mean() <= furthest, name
        np.testing.assert_array_equal(dali[name], memory[name], name)


@pytest.mark.parametrize("loader", LOADERS)
def test_training_windows_of_odd_images(odd: Odd, loader: str) -> None:
    config = dataclasses.replace(WHOLE, root=str(odd.root), loader=loader, image_size=20, flip=True)  # type: ignore[arg-type]
    loaded = TrainLoader(open_dataset(config), config, seed=1, global_batch_size=16, num_replicas=1, **ONE_RANK)
    for (images, _), request in zip(loaded.batches(), loaded.requests(), strict=False):
        if request.epoch > 0:
            break
        for position, image in enumerate(images.numpy().astype(np.int64)):
            name = Path(request.path(position)).name
            (top, left), (bottom, right) = (corner[position] for corner in request.windows)
            theirs = np.broadcast_to(odd.right[name].reshape(40, 36, -1), (40, 36, 3))[top:bottom, left:right]
            theirs = theirs[:, ::-1] if request.flips[position] else theirs
            assert np.abs(image - theirs).mean() <= COARSE.get(name, 1), name


@pytest.mark.parametrize("loader", LOADERS)
def test_what_no_loader_reads_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "all").mkdir()
    for name, reason in write_refused(tmp_path / "all").items():
        root = tmp_path / f"of {name}"
        (root / "train/a").mkdir(parents=True)
        (root / "val").symlink_to(root / "train")
        (root / "train/a" / name).write_bytes((tmp_path / "all" / name).read_bytes())
        config = dataclasses.replace(WHOLE, root=str(root), loader=loader)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"/{name} .*\(.*{reason}"):
            list(ValidationLoader(open_dataset(config), config, **ONE_RANK))


def test_dali_learns_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A PNG without its end: DALI fails at it once, then Pillow reads it, in every later iteration
    too."""
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data/train/a").mkdir(parents=True)
    (tmp_path / "data/val").symlink_to(tmp_path / "data/train")
    for index in range(12):
        path = tmp_path / f"data/train/a/{index:02d}.png"
        photo(40, 36, index).save(path)
        if index in (3, 10):
            path.write_bytes(path.read_bytes()[:-12])
    failures, run = [], dali._next_output

    def counted(*arguments: Any) -> Any:
        try:
            return run(*arguments)
        except RuntimeError:
            failures.append(1)
            raise

    monkeypatch.setattr(dali, "_next_output", counted)
    config = dataclasses.replace(WHOLE, root=str(tmp_path / "data"), val_batch_size=4, on_bad_sample="fail")
    loader = ValidationLoader(open_dataset(config), config, **ONE_RANK)
    for expected in (4, 4):  # two batches fail, and in each one image alone
        images = np.concatenate([images.numpy() for images, _ in loader])
        for index, image in enumerate(images):
            np.testing.assert_array_equal(image, np.asarray(photo(40, 36, index))[2:38])
        assert len(failures) == expected
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bitfleet:")]
    assert len(lines) == 1
    assert "Pillow reads" in lines[0]
    assert lines[0].count("/03.png") == 1


def test_dali_learns_of_a_whole_set_of_webp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads no lossless WebP with EXIF: the first batch says so of the others."""
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dali, "_MANY_WEBP", 3)
    (tmp_path / "data/train/a").mkdir(parents=True)
    (tmp_path / "data/val").symlink_to(tmp_path / "data/train")
    exif = Image.Exif()
    exif[0x0112] = 1
    for index in range(12):
        photo(40, 36, index).save(tmp_path / f"data/train/a/{index:02d}.webp", lossless=True, exif=exif)
    looked_at, look = [], dali.DaliPipeline._diagnose
    monkeypatch.setattr(
        dali.DaliPipeline, "_diagnose", lambda self, request: looked_at.append(request) or look(self, request)
    )
    config = dataclasses.replace(WHOLE, root=str(tmp_path / "data"), val_batch_size=4)
    images = np.concatenate(
        [images.numpy() for images, _ in ValidationLoader(open_dataset(config), config, **ONE_RANK)]
    )
    for index, image in enumerate(images):
        np.testing.assert_array_equal(image, np.asarray(photo(40, 36, index))[2:38])
    assert len(images) == 12
    assert len(looked_at) == 1


def test_decoding_keeps_what_is_plain() -> None:
    for image, right in ((Image.fromarray(RGB), RGB), (Image.fromarray(GREY), np.dstack([GREY] * 3))):
        file = io.BytesIO()
        image.save(file, "PNG")
        np.testing.assert_array_equal(np.asarray(decode(file.getvalue())), right)
