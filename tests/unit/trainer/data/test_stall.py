"""Waiting for images: what is late, what is silent, and what failed by itself."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bitfleet.trainer.data.image_list import ImageList
from bitfleet.trainer.data.request import Request
from bitfleet.trainer.data.sampler import Windows
from bitfleet.trainer.data.stall import result_within


def request_of(file: Path) -> Request:
    one = np.ones(1, np.int64)
    images = ImageList(
        folder=file.parent, names=np.array([file.name.encode()]), labels=one, heights=one, widths=one, sizes=one
    )
    corners = np.zeros((1, 2), np.int32)
    return Request(images, one - 1, Windows(corners, corners), np.zeros(1, np.int32), epoch=0)


def test_a_batch_that_is_late_on_a_disk_that_answers_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    asked = threading.Event()

    def probe(requests: list[Request]) -> None:
        asked.set()

    monkeypatch.setattr("bitfleet.trainer.data.stall._silent_file", probe)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(lambda: asked.wait(30) and "the batch")
        assert result_within(late, 0.05, [request_of(tmp_path / "a.jpg")]) == "the batch"


def test_one_that_never_comes_though_the_disk_answers_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    never: Future[None] = Future()
    with pytest.raises(ValueError, match=r"disk .* 0\.1 s.*data\.stall_seconds"):
        result_within(never, 0.05, [request_of(tmp_path / "a.jpg")])


def test_a_timeout_of_the_work_itself_is_passed_on() -> None:
    failed: Future[None] = Future()
    failed.set_exception(TimeoutError("of the work"))
    with pytest.raises(TimeoutError, match="of the work"):
        result_within(failed, 1.0, [])
