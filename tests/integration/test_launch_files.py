"""The files of launch/: they parse, what they call exists; slurm.sh saves and requeues (srun and
scontrol are fakes)."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitfleet.launch.parsing.arguments import parse_train
from tests.conftest import BIN, REPOSITORY

LAUNCH = REPOSITORY / "launch" / "cluster"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE/srun"
trap 'exit 75' USR1
touch "$FAKE/ready"
[ -z "${FAKE_CODE:-}" ] || exit "$FAKE_CODE"
while :; do sleep 0.1; done
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
echo "$@" > "$FAKE/scontrol"
"""
FAKE_SQUEUE = """#!/usr/bin/env bash
echo "${FAKE_STATE-RUNNING None}"
"""
FAKE_BITFLEET = """#!/usr/bin/env bash
printf '%s\\n' "$@"
"""
Slurm = Callable[..., subprocess.Popen[str]]
RUN = ["--config", "fashion_quickstart", "--run_dir", "/shared/my run", "--optim.gamma.start", "1e-4"]


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """Environment in which srun, scontrol and bitfleet only note what they are asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "squeue": FAKE_SQUEUE, "bitfleet": FAKE_BITFLEET}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(tmp_path), "SLURM_JOB_ID": "4711"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_may_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)


@pytest.fixture
def slurm_job() -> Iterator[Slurm]:
    """Starts slurm.sh in its own process group, of which nothing outlives the test."""
    jobs: list[subprocess.Popen[str]] = []

    def start(fakes: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
        command = ["bash", LAUNCH / "slurm.sh", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        jobs.append(subprocess.Popen(command, env=fakes, text=True, start_new_session=True, **streams))
        return jobs[-1]

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def run_arguments(tmp_path: Path) -> list[str]:
    """Options of the run that slurm.sh handed to srun; those of srun itself are checked."""
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[:6] == "--kill-on-bad-exit=0 --wait=60 --cpu-bind=none python -m bitfleet.launch.train".split()
    return words[6:]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_saves_and_requeues(
    slurm_job: Slurm, number: signal.Signals, fakes: dict[str, str], tmp_path: Path
) -> None:
    job = slurm_job(fakes, *RUN)
    give_up = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    job.send_signal(number)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 75, output
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    config = parse_train(run_arguments(tmp_path), "slurm.sh")
    assert (str(config.run_dir), config.resume, config.seed) == ("/shared/my run", "auto", 0)


SIGNAL_BEFORE_SRUN_IS_KNOWN = """
trap 'if [ "$BASH_COMMAND" = "srun=\\$!" ]; then
    while [ ! -e "$FAKE/ready" ]; do sleep 0.02; done; kill -USR1 $$; fi' DEBUG
"""


def test_slurm_passes_a_signal_on_that_comes_while_srun_starts(
    slurm_job: Slurm, fakes: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "env").write_text(SIGNAL_BEFORE_SRUN_IS_KNOWN)
    output, _ = slurm_job(fakes | {"BASH_ENV": str(tmp_path / "env")}, *RUN).communicate(timeout=20)
    assert "requeued" in output
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_slurm_requeues_nothing_else(slurm_job: Slurm, code: int, fakes: dict[str, str], tmp_path: Path) -> None:
    job = slurm_job(fakes | {"FAKE_CODE": str(code)}, *RUN)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == code, output
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(
    ("state", "requeued"),
    [  # as SLURM 22.05 answers
        ("COMPLETING None", False),  # after scancel; preempted, where SLURM requeues it itself
        ("COMPLETING TimeLimit", True),
        ("", True),  # squeue failed
    ],
)
def test_slurm_does_not_bring_a_cancelled_job_back(
    state: str, requeued: bool, slurm_job: Slurm, fakes: dict[str, str], tmp_path: Path
) -> None:
    job = slurm_job(fakes | {"FAKE_CODE": "75", "FAKE_STATE": state}, *RUN)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 75, output
    assert ((tmp_path / "scontrol").exists(), "is requeued" in output) == (requeued, requeued)


def test_slurm_continues_its_own_run_only(slurm_job: Slurm, fakes: dict[str, str], tmp_path: Path) -> None:
    done = fakes | {"FAKE_CODE": "0"}
    output, _ = (job := slurm_job(done, *RUN, "--resume", "runs/other")).communicate(timeout=20)
    assert (job.returncode, output.startswith("slurm.sh: error: leave out --resume runs/other")) == (2, True)
    output, _ = (job := slurm_job(done, "--run-dir=/runs/x", "--resume=auto")).communicate(timeout=20)
    assert job.returncode == 0, output
    assert run_arguments(tmp_path) == ["--run_dir", "/runs/x", "--resume", "auto"]


def test_slurm_array_has_a_folder_and_a_seed_for_each_index(
    slurm_job: Slurm, fakes: dict[str, str], tmp_path: Path
) -> None:
    job = slurm_job(
        fakes | {"FAKE_CODE": "0", "SLURM_ARRAY_TASK_ID": "2"}, "--config=fashion_quickstart", "--run_dir=/runs/x"
    )
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 0, output
    config = parse_train(run_arguments(tmp_path), "slurm.sh")
    assert (str(config.run_dir), config.seed) == ("/runs/x-2", 2)


@pytest.mark.parametrize("more", [[], ["--run_dir"]])
def test_slurm_needs_a_run_folder(more: list[str], slurm_job: Slurm, fakes: dict[str, str]) -> None:
    output, _ = (job := slurm_job(fakes, "--config", "fashion_quickstart", *more)).communicate(timeout=20)
    assert (job.returncode, output.startswith("slurm.sh: error: pass --run_dir")) == (2, True)


def test_single_node(fakes: dict[str, str]) -> None:
    script = LAUNCH / "single_node.sh"
    done = subprocess.run(
        [script, "/my runs/x", *RUN[:2]], env=fakes | {"RANKS": "2"}, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[:4] == ["launch", "deepspeed", "--gpus", "2"]
    assert parse_train(words[4:], "single_node.sh").resume == "auto"
    done = subprocess.run([script, "runs/x", "--config=NAME"], env=fakes, capture_output=True, text=True, check=True)
    assert done.stdout.split() == "launch deepspeed --run_dir runs/x --resume auto --config=NAME".split()
    for words in ([], ["runs/x"], ["--config", "NAME"]):
        assert subprocess.run([script, *words], capture_output=True).returncode == 2


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "container" / "Dockerfile"], ids=lambda path: path.name)
def test_commands_in_comments_are_options_of_a_run(path: Path) -> None:
    text = re.sub(r"\\\n#", " ", path.read_text())
    for line in re.findall(r"^#\s+(.*--config .*)$", text, re.MULTILINE):
        words = shlex.split(re.sub(r" {4,}.*", "", line.partition("--config")[1] + line.partition("--config")[2]))
        parse_train(words, path.name)


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())}


def test_kubernetes_fits_together(manifests: dict[str, Any]) -> None:
    service, job = manifests["Service"], manifests["Job"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": manifests["Job"]["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["RANKS"])
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy needs
    codes = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {75: "Ignore", 2: "FailJob"}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    memory = next(each for each in pod["volumes"] if "emptyDir" in each)
    assert memory["emptyDir"]["medium"] == "Memory"
    assert {"name": memory["name"], "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_kubernetes_container_starts_its_node(manifests: dict[str, Any], fakes: dict[str, str], tmp_path: Path) -> None:
    (container,) = manifests["Job"]["spec"]["template"]["spec"]["containers"]
    command = [word.replace("/tmp/hosts", f"{tmp_path}/hosts") for word in container["command"]]
    variables = {each["name"]: each["value"] for each in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    done = subprocess.run(
        [*command, *container["args"]], env=fakes | variables, capture_output=True, text=True, check=True
    )
    from bitfleet.launch.cluster.command import read_request

    launch, launcher, *rest = done.stdout.splitlines()
    request, config = read_request(rest, launcher)
    assert (launch, launcher) == ("launch", "deepspeed")
    assert (request.node_rank, request.world_size, request.master_addr) == (1, 16, "bitfleet-0.bitfleet")
    assert (config.name, config.resume) == ("birealnet18_imagenet", "auto")
    assert config.engine.collective_timeout_minutes == 20  # pods may start long after each other


def test_container_builds_from_what_is_there() -> None:
    text = (LAUNCH / "container" / "Dockerfile").read_text()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "-c constraints.txt" in text
    assert (REPOSITORY / "constraints.txt").is_file()
    assert set(re.findall(r"dali-\w+", text)) <= extras.keys()
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    assert not re.search(r"https?://|--index-url", text)


def test_print_runs_as_a_command(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}/src"}
    command = [
        BIN / "bitfleet",
        "launch",
        "--print",
        "deepspeed",
        "--hostfile",
        tmp_path / "hosts",
        "--device",
        "cpu",
        *RUN,
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "DS_ACCELERATOR=cpu" in done.stdout
    assert "--module bitfleet.launch.train --device cpu --config fashion_quickstart" in done.stdout
    assert "It assumes:" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"hosts"}
