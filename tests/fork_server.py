"""Start Python programs as forks of one process that has imported torch, DeepSpeed and bitfleet.

An interpreter needs five seconds of CPU time before it trains; a fork of one that is ready needs
none.

Real in a fork: process id, session and process group, parent, environment, arguments, working
directory, standard input and outputs, signals, exit code, threads, sockets, and what the program
computes, bit for bit.

Not real: the command line in /proc is the server's; modules are imported already, so an import that
fails is not seen, nor an environment variable that a library reads while it is loaded; the
interpreter is not taken apart at its end; and what starts ranks and ends them when one fails is not
a launcher but `_lead`, which does as DeepSpeed's agent does. Tests of these things start real
processes with `run_command` or `deepspeed`.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

PRELOADED = (
    "torch.utils.tensorboard",
    "deepspeed",
    "nvidia.dali",
    "bitfleet.launch.train",
    "bitfleet.launch.evaluate",
    "bitfleet.trainer.trainer",
)
"""Modules that the server imports; none may start a thread, which a fork would lack."""
TERMINATE_SECONDS = 30.0
"""Time that ranks have to end after SIGTERM when another has failed, as under DeepSpeed's
launcher."""


class ForkedProcess:
    """A forked program, or the leader of forked ranks: the part of `subprocess.Popen` that tests
    use."""

    def __init__(self, pid: int, status: socket.socket, output: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status, self._output = status, output
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with open(self._output, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 16):
                self._chunks.append(chunk)

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; None while the process runs."""
        with contextlib.suppress(TimeoutError):
            self._wait(0.0)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait until the process has ended and its output is closed; return stdout and stderr in
        one text.

        Raises:
            subprocess.TimeoutExpired: that takes longer than `timeout` seconds.
        """
        give_up = time.monotonic() + timeout
        try:
            self._wait(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired("fork", timeout) from None
        self._reader.join(max(0.0, give_up - time.monotonic()))
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired("fork", timeout)
        return b"".join(self._chunks).decode(), None

    def _wait(self, timeout: float) -> None:
        if self.returncode is None:
            self._status.settimeout(timeout if timeout > 0 else 1e-6)
            self.returncode = int(self._status.recv(16))
            self._status.close()


class ForkServer:
    """The process that forks; one per pytest process, started by its first use."""

    def __init__(self, environment: Mapping[str, str], cwd: Path) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.fork_server", str(theirs.fileno())],
            # One thread in numpy: a fork has only the thread that forks.
            env={**environment, "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, num_ranks: int | None = None
    ) -> ForkedProcess:
        """Fork a program in its own session.

        Args:
            arguments: those of the interpreter: a script or "-m" and a module, then the program's
                own.
            environment: all of its variables; ranks have those of DeepSpeed's launcher besides.
            num_ranks: None for one process; else a leader starts this many ranks and ends with the
                code of the first that fails.
        """
        status, their_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        output, their_output = os.pipe()
        request = {"arguments": arguments, "environment": dict(environment), "cwd": str(cwd), "num_ranks": num_ranks}
        with tempfile.TemporaryFile() as file:  # an environment may be larger than a message
            file.write(json.dumps(request).encode())
            file.flush()
            socket.send_fds(self._socket, [b"fork"], [file.fileno(), their_output, their_status.fileno()])
        os.close(their_output)
        their_status.close()
        status.settimeout(120)
        pid = status.recv(16)
        assert pid, "the fork server has died"
        return ForkedProcess(int(pid), status, output)

    def close(self) -> None:
        """End the server; processes that it forked continue."""
        self._socket.close()
        self._process.wait(timeout=30)


def _serve(control: socket.socket) -> list[str]:
    """Fork for every request until the client has gone; returns the program's arguments, in the
    fork only."""
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 16, 3)
        with contextlib.suppress(ChildProcessError):  # wardens that have ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            os._exit(0)
        file, output, status = descriptors
        if os.fork() == 0:
            control.close()
            return _warden(file, output, socket.socket(fileno=status))
        for descriptor in descriptors:
            os.close(descriptor)


def _warden(file: int, output: int, status: socket.socket) -> list[str]:
    """Fork the program, tell its process id, wait for it and tell its exit code."""
    pid = os.fork()
    if pid:
        os.close(output)
        while os.getsid(pid) != pid:  # callers may signal its process group as soon as they have its id
            time.sleep(0.001)
        status.send(str(pid).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # the client may have gone
            status.send(str(code).encode())
        os._exit(0)
    status.close()
    os.setsid()
    with open(file, "rb") as stream:
        stream.seek(0)
        request = json.load(stream)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    arguments: list[str] = request["arguments"]
    return arguments if request["num_ranks"] is None else _lead(request["num_ranks"], arguments)


def _lead(num_ranks: int, arguments: list[str]) -> list[str]:
    """Fork the ranks of one machine and end as they do; returns the arguments, in a rank only."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": str(num_ranks)}
    ranks = set()
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            return arguments
        ranks.add(pid)
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if code := os.waitstatus_to_exitcode(status):
            _terminate(ranks)
            os._exit(code if code > 0 else 256 + code)  # of a signal, as sys.exit(-9) does
    os._exit(0)


def _terminate(ranks: set[int]) -> None:
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + TERMINATE_SECONDS
    while ranks:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        ranks.discard(pid)
        if time.monotonic() > give_up:
            for left in ranks:
                os.kill(left, signal.SIGKILL)
        time.sleep(0.01)


def _run(arguments: list[str]) -> NoReturn:
    """Run the program in this process as the interpreter would, and leave without taking apart what
    the server imported."""
    code = 0
    try:
        _run_main(arguments)
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_main(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).absolute().parent)
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _main() -> NoReturn:
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1
    gc.freeze()  # a collection in a fork would copy the pages of all that the server has
    arguments = _serve(control)
    np.random.seed()  # noqa: NPY002  # a fresh process draws its own
    _run(arguments)


if __name__ == "__main__":
    _main()
