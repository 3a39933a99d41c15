"""The versions that pyproject.toml admits, and the two sets that are tested: with the newest torch
and with the oldest."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parents[2]
NEWEST, OLDEST = "constraints.txt", "constraints-torch2.11.txt"
OF_TORCH = ("torch", "torchvision", "triton", "setuptools", "cuda-", "nvidia-")


def pins(file: str) -> dict[str, str]:
    lines = (REPOSITORY / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [each for name in ("dali-cu13", "dev", "export") for each in project["optional-dependencies"][name]]
    return {each.name: each for each in map(Requirement, project["dependencies"] + extras)}


@pytest.mark.parametrize("file", [NEWEST, OLDEST])
def test_tested_versions_are_admitted(file: str) -> None:
    pinned = {name.lower(): version for name, version in pins(file).items()}
    for name, requirement in requirements().items():
        assert requirement.specifier.contains(pinned[name]), name


def test_lower_bound_of_torch_is_tested() -> None:
    for name in ("torch", "torchvision"):
        major, minor = Version(pins(OLDEST)[name]).release[:2]
        assert not requirements()[name].specifier.contains(f"{major}.{minor - 1}.99"), name


def test_the_two_sets_differ_only_in_what_torch_needs() -> None:
    newest, oldest = pins(NEWEST), pins(OLDEST)
    assert newest.keys() == oldest.keys()
    different = {name for name in newest if newest[name] != oldest[name]}
    assert "torch" in different
    assert not {name for name in different if not name.startswith(OF_TORCH)}


@pytest.mark.parametrize(
    ("torch", "answer"),
    [
        ("2.11", f".venv-torch2.11/bin/python -m pip install --quiet --disable-pip-version-check -c {OLDEST}"),
        ("2.10", "TORCH is 2.10; expected 2.11, or nothing for the newest that is supported"),
    ],
)
def test_make_takes_the_oldest_torch_and_names_an_unknown_one(torch: str, answer: str) -> None:
    command = ["make", "--dry-run", "--always-make", "setup", f"TORCH={torch}"]
    environment = {"PATH": os.environ["PATH"]}  # without the options of a make that runs the tests
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=20)
    assert answer in done.stdout + done.stderr
    assert (done.returncode == 0) == (torch == "2.11")
