"""Check what `bitfleet launch --print` shows, read back by the launchers' own parsers if they are
installed."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from bitfleet.launch.cluster.command import read_request
from bitfleet.launch.cluster.hosts import Host
from bitfleet.launch.cluster.launchers import (
    PRINTERS,
    Request,
    deepspeed_line,
    deepspeed_words,
    pdsh_argument,
    traveling,
    users_lines,
)

RUN = ["--config", "fashion_quickstart", "--run_dir", "/shared/my run"]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=8\nnode2 slots=8\n")
    return str(path)


def test_deepspeed_parses_what_is_printed(hostfile: str) -> None:
    from deepspeed.launcher.runner import parse_args

    request, _ = read_request(["--hostfile", hostfile, "--master_addr", "10.0.0.1", *RUN], "deepspeed")
    *_, command = PRINTERS["deepspeed"](request).lines
    variable, *rest = words(command)
    assert variable.startswith("PDSH_SSH_ARGS_APPEND=-o BatchMode=yes -o ServerAliveInterval=")
    parsed = parse_args(rest[1:])
    assert (parsed.hostfile, parsed.master_addr, parsed.module) == (hostfile, "10.0.0.1", True)
    assert (parsed.user_script, parsed.user_args) == ("bitfleet.launch.train", RUN)
    assert not parsed.force_multi


def test_one_remote_host_is_not_started_here(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("elsewhere.invalid slots=2\n")
    request, _ = read_request(["--hostfile", str(tmp_path / "hosts"), *RUN], "deepspeed")
    assert request.by_ssh
    assert "--force_multi" in deepspeed_words(request)
    assert "`hostname -I` on elsewhere.invalid" in str(PRINTERS["deepspeed"](request))
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    request, _ = read_request(["--hostfile", str(tmp_path / "hosts"), *RUN], "deepspeed")
    assert deepspeed_words(request)[1:3] == ["--num_accelerators", "2"]


def test_each_node_of_its_own(hostfile: str) -> None:
    where = ["--hostfile", hostfile, "--no_ssh", "--node_rank", "1"]
    request, _ = read_request([*where, *RUN], "deepspeed")
    line = shlex.join(deepspeed_words(request))
    assert "--no_ssh --node_rank 1 --master_addr node1" in line
    assert line.endswith("--run_dir '/shared/my run'")  # no shell of another machine reads it


def test_torchrun_line_for_each_node(hostfile: str) -> None:
    from torch.distributed.run import parse_args

    request, _ = read_request(["--hostfile", hostfile, *RUN], "torchrun")
    lines = PRINTERS["torchrun"](request).lines
    assert lines[::2] == ("# on node1", "# on node2")
    for rank, line in enumerate(lines[1::2]):
        parsed = parse_args(words(line)[1:])
        assert (parsed.nnodes, parsed.node_rank, parsed.nproc_per_node) == ("2", rank, "8")
        assert (parsed.master_addr, parsed.master_port, parsed.module) == ("node1", 29500, True)
        assert parsed.training_script_args == RUN
    request, _ = read_request(["--gpus", "2", *RUN], "torchrun")
    assert parse_args(words(PRINTERS["torchrun"](request).lines[0])[1:]).standalone


def test_mpirun(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    request, _ = read_request(["--hostfile", hostfile, *RUN], "mpirun")
    (line,) = PRINTERS["mpirun"](request).lines
    assert line.startswith(f"mpirun -np 16 --bind-to none --hostfile {hostfile} ")
    assert "-x MASTER_ADDR=node1 -x MASTER_PORT=29500" in line
    assert "-x OMP_NUM_THREADS" in line


def test_slurm_and_kubernetes_name_their_files() -> None:
    request, _ = read_request(["--nodes", "4", "--gpus", "8", *RUN], "slurm")
    (line,) = PRINTERS["slurm"](request).lines
    sbatch, *rest = words(line)
    assert (sbatch, rest[:6]) == ("sbatch", "--nodes 4 --ntasks-per-node 8 --gpus-per-node 8".split())
    assert Path(rest[6]).is_file()
    assert rest[7:] == RUN
    printed = PRINTERS["kubernetes"](request)
    assert Path(words(printed.lines[-1])[3]).is_file()
    assert "completions, parallelism: 4" in str(printed)


def test_nodes_of_a_hostfile(hostfile: str) -> None:
    request, _ = read_request(["--hostfile", hostfile, *RUN], "slurm")
    (line,) = PRINTERS["slurm"](request).lines
    sbatch = "sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --nodelist node1,node2 ".split()
    assert words(line)[: len(sbatch)] == sbatch
    assert "not the hostfile" in PRINTERS["kubernetes"](request).assumptions[-1]


def test_pods_continue_and_their_arguments_are_yaml() -> None:
    run = ["--config", "fashion_quickstart", "--run_dir", '/shared/it\'s "a" run']
    for more, expected in (([], [*run, "--resume", "auto"]), (["--resume=auto"], [*run, "--resume=auto"])):
        request, _ = read_request(["--gpus", "8", *run, *more], "kubernetes")
        (line,) = [line for line in PRINTERS["kubernetes"](request).lines if "args:" in line]
        assert yaml.safe_load(line.removeprefix("#")) == {"args": expected}


def test_port_on_one_machine(tmp_path: Path) -> None:
    from torch.distributed.run import parse_args

    (tmp_path / "hosts").write_text("node5 slots=1\n")
    request, _ = read_request(["--hostfile", str(tmp_path / "hosts"), "--master_port", "1234", *RUN], "torchrun")
    printed = PRINTERS["torchrun"](request)
    parsed = parse_args(words(printed.lines[0])[1:])
    assert (parsed.master_port, parsed.standalone, printed.assumptions[0]) == (1234, False, "1 rank on node5")
    request, _ = read_request(["--gpus", "2", "--master_port", "1234", *RUN], "mpirun")
    assert "-x MASTER_PORT=1234 --oversubscribe" in PRINTERS["mpirun"](request).lines[0]


@pytest.mark.parametrize(
    ("arguments", "launcher", "message"),
    [
        ("--nodes 2 --gpus 8", "deepspeed", "--hostfile"),
        ("--nodes 2 --gpus 8", "torchrun", "--hostfile, or --master_addr"),
        ("--hostfile HOSTS --gpus 8", "deepspeed", "--hostfile .*--nodes and --gpus"),
        ("--hostfile HOSTS --no_ssh", "deepspeed", "--no_ssh, --node_rank and --hostfile"),
        ("--hostfile HOSTS --no_ssh --node_rank 2", "deepspeed", "--node_rank .* 0 to 1, not 2"),
        ("--gpus 2 --optim.gama.start 1", "deepspeed", "--optim.gamma.start"),
        ("--gpus 2 --bind_cores_to_rank 1", "deepspeed", "--bind_cores_to_rank"),
        ("--gpus 0", "deepspeed", "--gpus.* '0'"),
        ("--gpus 2 --master_port 66000", "deepspeed", "--master_port .*65535, not 66000"),
        ("--hostfile HOSTS --no_ssh --node_rank 1", "torchrun", "--no_ssh and --node_rank .* deepspeed, not torchrun"),
        ("--gpus 2 --node_rank 0", "slurm", "--no_ssh and --node_rank .* deepspeed, not slurm"),
        ("--gpus 2 --master_addr ib0.node1", "slurm", "--master_addr .* export MASTER_ADDR"),
        ("--gpus 2 --master_port 1234", "kubernetes", "--master_port: .* kubernetes.yaml"),
    ],
)
def test_bad_request_is_one_sentence(arguments: str, launcher: str, message: str, hostfile: str) -> None:
    with pytest.raises(ValueError, match=message):
        request, _ = read_request([*arguments.replace("HOSTS", hostfile).split(), *RUN], launcher)
        PRINTERS[launcher](request)


def test_several_nodes_share_a_run_folder(hostfile: str) -> None:
    with pytest.raises(ValueError, match="--run_dir"):
        read_request(["--hostfile", hostfile, "--config", "fashion_quickstart"], "deepspeed")


def test_uneven_hosts(hostfile: str) -> None:
    hosts = (Host("a", 4), Host("b", 8))
    with pytest.raises(ValueError, match="slurm .* 4 and 8"):
        PRINTERS["slurm"](Request(hosts, tuple(RUN)))


@pytest.mark.parametrize(
    "argument", ["plain", "two words", "a$HOME", "$HOME and `id`", "(1,2)", "a'b", 'x "y" z', "back\\slash s", ""]
)
def test_argument_survives_deepspeed_and_the_remote_shell(argument: str) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.args = type("", (), {"user_args": [pdsh_argument(argument)]})()
    script = "printf %s " + " ".join(runner.parse_user_args())
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == argument
    assert pdsh_argument("50%n") == "50%%n"


def test_what_the_ranks_need_travels() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "GLOO_SOCKET_IFNAME": "ib0",
        "BITFLEET_CACHE": "/scratch",
        "BITFLEET_ALONE": "1",
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
    with pytest.raises(ValueError, match="NCCL_X"):
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
    with pytest.raises(ValueError, match=r"\.deepspeed_env, line 2: .*NAME=VALUE"):
        users_lines((home, here))
