"""Shards that are compressed: unpacked once, whole or not at all."""

from pathlib import Path

import numpy as np
import pytest

from bitfleet.launch.data.compressed_shards import unpack
from bitfleet.launch.data.prepare import prepare
from bitfleet.trainer.data import DataConfig, open_dataset
from tests import miniature

pytestmark = pytest.mark.usefixtures("miniature_counts")


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
    with pytest.raises(
        ValueError, match=rf"shard {damaged[0]} cannot be unpacked \(.*; the shard {damaged[1]} cannot be"
    ):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest").exists()
    assert not list((tmp_path / "dest.unfinished").rglob(f"{damaged[0].name.removesuffix('.gz')}"))


def test_a_shard_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shards a\.tar and a\.tar\.gz in .* are one shard twice"):
        unpack(tmp_path, ["a.tar", "a.tar.gz"], tmp_path / "into", num_workers=1)


def test_they_are_unpacked_into_a_folder_of_their_own(tmp_path: Path) -> None:
    source = compressed(tmp_path, ".tar.gz", "w:gz")
    with pytest.raises(ValueError, match="has something else in it"):
        prepare(source, source, num_workers=1)
