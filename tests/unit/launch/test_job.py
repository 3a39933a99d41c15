"""Check what a process sets before its ranks meet, and what its failures print."""

import dataclasses
import errno
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from bitfleet.configs import load_config
from bitfleet.launch.job import _thread_failed, job, ranks_of_process, same_on_all_hosts
from bitfleet.trainer.engine import arithmetic
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.ranks import collectives as distributed
from bitfleet.trainer.ranks.membership import membership


def fail(error: Exception) -> None:
    _thread_failed(threading.ExceptHookArgs((type(error), error, None, threading.current_thread())))


def test_full_disk_is_left_to_the_main_thread(capsys: pytest.CaptureFixture[str]) -> None:
    fail(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err == ""
    fail(OSError(errno.ENOENT, "No such file"))
    fail(KeyError("x"))
    assert capsys.readouterr().err.count("Exception in thread") == 2


def test_a_file_that_this_user_may_not_read_is_one_line() -> None:
    code = """
from bitfleet.launch.job import run
def main():
    raise PermissionError(13, "Permission denied", "/data/manifest.json")
run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Permission denied: '/data/manifest.json'" in done.stderr


def test_a_path_outside_utf8_is_printed() -> None:
    code = """
from bitfleet.launch.job import run
run(lambda: print("/data/K\\udcf6ln"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (done.returncode, done.stdout) == (0, b"/data/K\\udcf6ln\n")


def test_print_after_the_end_of_the_reader_is_no_error() -> None:
    code = """
import sys
from bitfleet.launch.job import run
def main():
    print("first")
    sys.stdin.readline()
    for _ in range(3):
        print("nobody reads this")
    sys.exit(75)
run(main)
"""
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as job:
        assert job.stdout is not None
        assert job.stdin is not None
        assert job.stdout.readline() == b"first\n"
        job.stdout.close()
        job.stdin.write(b"\n")
        job.stdin.close()
        assert job.wait(timeout=30) == 75


def test_closed_output_is_no_error() -> None:
    code = "from bitfleet.launch.job import run; run(lambda: print('nobody reads this'))"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_gpu_without_memory_is_one_sentence() -> None:
    code = """
import torch
from bitfleet.launch.job import run
def main():
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB of which 1 MiB is free. And"
    raise torch.OutOfMemoryError(text)
run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("bitfleet: error: a GPU of ")
    assert "(Tried to allocate 2.00 GiB. GPU 0 has 79 GiB of which 1 MiB is free): use smaller batches, or" in line


def test_environment_is_completed_once_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    ranks = ranks_of_process()
    assert not ranks.launched
    first = {name: os.environ[name] for name in names}
    assert (first["WORLD_SIZE"], first["MASTER_PORT"]) == ("1", str(ranks.master_port))
    assert ranks_of_process() == ranks
    assert {name: os.environ[name] for name in names} == first


def test_arithmetic_is_set_before_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS and NCCL read it when they start."""
    for name in "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    order: list[Any] = []
    monkeypatch.setattr(arithmetic, "use_arithmetic", lambda device, config: order.append((device.type, config)))
    monkeypatch.setattr(distributed, "use_device", lambda *_: order.append("device"))
    monkeypatch.setattr(type(membership), "join", lambda *_: order.append("met"))
    config = load_config("fashion_quickstart")
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bf16"))
    for each, expected in ((config, config.engine), (None, EngineConfig())):
        order.clear()
        with pytest.raises((AttributeError, TypeError)), job("cpu", each):  # `join` is none
            pass
        assert order == [("cpu", expected), "device", "met"]


def test_the_path_of_the_data_may_differ_between_hosts() -> None:
    config = load_config("fashion_quickstart")
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, root="/elsewhere"))
    assert same_on_all_hosts(config) == same_on_all_hosts(other)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=64))
    assert same_on_all_hosts(config) != same_on_all_hosts(other)
