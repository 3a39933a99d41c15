"""What travels to other machines, through DeepSpeed's own code."""

import subprocess
from pathlib import Path

import pytest

from bitfleet.launch.cluster.exports import deepspeed_line, traveling, users_lines


def test_what_the_ranks_need_travels() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "GLOO_SOCKET_IFNAME": "ib0",
        "BITFLEET_CACHE": "/scratch",
        "HOME": "/root",
        "RANK": "0",
        "SSH_AUTH_SOCK": "/x",
    }
    assert traveling(environ, "auto").keys() == {
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "GLOO_SOCKET_IFNAME",
        "BITFLEET_CACHE",
    }
    assert traveling(environ, "cpu")["DS_ACCELERATOR"] == "cpu"
    assert traveling(environ | {"DS_ACCELERATOR": "xpu"}, "cpu")["DS_ACCELERATOR"] == "xpu"
    with pytest.raises(ValueError, match="NCCL_X has several lines"):
        traveling({"NCCL_X": "a\nb"}, "auto")


@pytest.mark.parametrize("value", ["4", "a b", 'say "x"', "$HOME `id` \\", "{'a': 1}", "1;2", ""])
def test_value_reaches_a_remote_shell_unchanged(value: str) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    name, line = deepspeed_line("X", value).split("=", maxsplit=1)
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    runner.add_export(name, line)
    script = f'export X={runner.exports["X"]}; printf %s "$X"'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == value


def test_lines_of_the_user_come_along(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=1\nB=2\n"), (here, "A=3\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    assert users_lines((home, here, tmp_path)) == ["A=1", "B=2", "A=3"]
    (here / ".deepspeed_env").write_text("A=3\n\n")
    with pytest.raises(ValueError, match=r"\.deepspeed_env, line 2: DeepSpeed reads only lines NAME=VALUE, not ''"):
        users_lines((home, here))
