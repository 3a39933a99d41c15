"""What a thread's failure prints."""

import errno
import threading

import pytest

from bitfleet.launch.environment import _thread_failed


def fail(error: Exception) -> None:
    _thread_failed(threading.ExceptHookArgs((type(error), error, None, threading.current_thread())))


def test_full_disk_is_left_to_the_main_thread(capsys: pytest.CaptureFixture[str]) -> None:
    fail(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err == ""
    fail(OSError(errno.ENOENT, "No such file"))
    fail(KeyError("x"))
    assert capsys.readouterr().err.count("Exception in thread") == 2
