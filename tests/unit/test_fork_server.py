"""A fork behaves as the process that it stands for."""

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import run_python, run_ranks, start_python


def write(folder: Path, program: str) -> Path:
    path = folder / "program.py"
    path.write_text(program)
    return path


def test_environment_arguments_folder_and_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THIS_TEST", "1")
    program = write(
        tmp_path,
        "import os, sys\nprint(sys.argv[1:], os.environ['OF_THIS_TEST'], os.getcwd(), os.getsid(0) == os.getpid(), "
        "__name__)\nprint('error', file=sys.stderr)\n",
    )
    done = run_python(program, "a", "b", cwd=tmp_path)
    assert done.stdout == f"['a', 'b'] 1 {tmp_path} True __main__\nerror\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(7)", 7),
        ("sys.exit('a reason')", 1),
        ("raise ValueError('a reason')", 1),
        ("os._exit(3)", 3),
        ("os.kill(os.getpid(), 9)", -9),
    ],
)
def test_exit_code(end: str, code: int, tmp_path: Path) -> None:
    done = run_python(write(tmp_path, f"import os, sys\n{end}\n"))
    assert done.returncode == code
    assert ("a reason" in done.stdout) == ("a reason" in end)


def test_signal_reaches_the_program(tmp_path: Path) -> None:
    program = write(tmp_path, "import signal, time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    process = start_python(program)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    program = write(
        tmp_path,
        "import os, sys, time\nprint('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], "
        "flush=True)\nsys.exit(5) if os.environ['RANK'] == '1' else time.sleep(600)\n",
    )
    done = run_ranks(3, program)
    assert done.returncode == 5
    assert "rank 1 of 3" in done.stdout
