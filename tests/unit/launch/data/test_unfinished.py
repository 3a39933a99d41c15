"""DEST.unfinished: what an interrupted run leaves is continued, and never taken for finished."""

import errno
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bitfleet.launch.data import archives
from bitfleet.launch.data import prepare as preparing
from bitfleet.launch.data.archives import TRAIN_FILE, VAL_FILE
from bitfleet.launch.data.prepare import prepare
from bitfleet.launch.data.unfinished import write_unsynced
from tests import miniature
from tests.miniature import extracted, images_of

REPOSITORY = Path(__file__).parents[4]


class PowerCutError(BaseException):
    """The process ends here."""


def cut(*_: object) -> None:
    raise PowerCutError


pytestmark = pytest.mark.usefixtures("miniature_counts")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return miniature.archives(tmp_path / "source")


def test_interrupted_again_and_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest, written = tmp_path / "dest", []

    def write_two_and_a_half(path: Path, content: bytes) -> None:
        if len(written) % 3 == 2:
            written.append(None)
            path.with_name(f".tmp-{path.name}").write_bytes(content[: len(content) // 2])
            raise PowerCutError
        write_unsynced(path, content)
        written.append(path)

    monkeypatch.setattr(archives, "write_unsynced", write_two_and_a_half)
    for _ in range(8):  # the ninth would write the last of 18 images
        with pytest.raises(PowerCutError):
            prepare(source, dest, num_workers=1)
        assert not dest.exists()

    for module, step in ((preparing, "write_manifest"), (os, "sync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, step, cut)
            with pytest.raises(PowerCutError):
                prepare(source, dest, num_workers=1)
        assert not dest.exists()
    prepare(source, dest, num_workers=1)
    whole = [path for path in written if path]
    assert len(whole) == len(set(whole)) == 18  # nothing was written again
    assert images_of(dest) == extracted()
    assert not list(tmp_path.rglob(".*"))


def test_killed(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time, pytest, pathlib\nfrom bitfleet.launch.data import archives, prepare, unfinished\nfrom tests "
        "import miniature\nminiature.patch(pytest.MonkeyPatch())\narchives.write_unsynced = lambda *file: "
        "(time.sleep(0.05), unfinished.write_unsynced(*file))\nprepare.prepare(*map(pathlib.Path, sys.argv[1:]), "
        "num_workers=1)\n"
    )
    dest = tmp_path / "dest"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(dest)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([f"{REPOSITORY}/src", str(REPOSITORY), *sys.path])},
    )
    deadline = time.monotonic() + 600
    while len(list(tmp_path.glob("dest.unfinished/train/*/n*"))) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not dest.exists()
    assert len(images_of(tmp_path / "dest.unfinished")) < 18
    prepare(source, dest, num_workers=1)
    assert images_of(dest) == extracted()


def test_a_short_or_broken_file_of_an_earlier_run_is_written_again(source: Path, tmp_path: Path) -> None:
    wrong = source / VAL_FILE
    content = wrong.read_bytes()
    wrong.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is incomplete"):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest.unfinished").exists()  # nothing was written yet
    wrong.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(os, "sync", cut)
        prepare(source, tmp_path / "dest", num_workers=1)
    files = sorted((tmp_path / "dest.unfinished/train").rglob("*.JPEG"))
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(bytes(files[1].stat().st_size))
    prepare(source, tmp_path / "dest", num_workers=1)
    assert images_of(tmp_path / "dest") == extracted()


def test_a_full_disk_is_a_sentence_and_the_next_run_continues(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        if len(written) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_unsynced(path, content)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(archives, "write_unsynced", full)
        with pytest.raises(ValueError, match="No space left on device"):
            prepare(source, tmp_path / "dest", num_workers=1)
    times = [path.stat().st_mtime_ns for path in written]
    prepare(source, tmp_path / "dest", num_workers=1)
    kept = [tmp_path / "dest" / path.relative_to(tmp_path / "dest.unfinished") for path in written]
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert images_of(tmp_path / "dest") == extracted()


def test_too_little_space_is_told_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statvfs = os.statvfs

    def little(path: Path) -> os.statvfs_result:
        status = list(statvfs(path))
        status[4] = 1  # f_bavail
        return os.statvfs_result(status)

    monkeypatch.setattr(os, "statvfs", little)
    with pytest.raises(ValueError, match=r"dest\.unfinished has 0\.0 GiB free and 0\.0 GiB"):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest.unfinished").exists()


def test_an_unpacked_archive_may_hold_dest(source: Path, tmp_path: Path) -> None:
    """The size of such a folder is larger at the next start."""
    with tarfile.open(source / TRAIN_FILE) as archive:
        archive.extractall(source, filter="data")
    (source / TRAIN_FILE).unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(os, "sync", cut)
        prepare(source, source / "dest", num_workers=1, allow_incomplete=True)
    size = source.stat().st_size
    for index in range(100):
        (source / f"{index:0200}").touch()
    assert source.stat().st_size > size
    prepare(source, source / "dest", num_workers=1, allow_incomplete=True)
    assert images_of(source / "dest") == extracted()


def test_unfinished_of_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(os, "sync", cut)
        prepare(source, tmp_path / "dest", num_workers=1)
    with (source / VAL_FILE).open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"dest\.unfinished .*other settings"):
        prepare(source, tmp_path / "dest", num_workers=1)
    (tmp_path / "other.unfinished").mkdir()
    (tmp_path / "other.unfinished/mine").touch()
    with pytest.raises(ValueError, match=r"other\.unfinished .*other settings"):
        prepare(source, tmp_path / "other", num_workers=1)
    (tmp_path / "other.unfinished/.plan.json").write_bytes(b"")  # after a power failure
    with pytest.raises(ValueError, match=r"other\.unfinished .*other settings"):
        prepare(source, tmp_path / "other", num_workers=1)
