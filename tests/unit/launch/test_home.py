"""Start as users that the password file does not know, or that have no home folder."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from bitfleet.launch import home
from tests.conftest import run_command

UID = os.getuid()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "known", "expected"),
    [
        ({}, None, "made"),
        ({"HOME": ""}, None, "made"),
        ({"HOME": "/proc"}, None, "made"),  # cannot be written, as the HOME=/ of a container
        ({}, "/nonexistent", "made"),  # nobody
        ({"HOME": "{tmp}"}, None, "{tmp}"),
        ({"HOME": "/proc"}, "/nonexistent", "/proc"),  # a known user with HOME set
        ({}, "{tmp}", None),
    ],
)
def test_home_is_made_only_where_there_is_none(
    environ: dict[str, str], known: str | None, expected: str | None, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "_known", lambda number: known and known.format(tmp=temporary))
    monkeypatch.setattr("os.access", lambda folder, mode: str(folder) == str(temporary))
    environ = {name: value.format(tmp=temporary) for name, value in environ.items()}
    home.have_home(environ)
    made = str(temporary / f"bitfleet-home-{UID}")
    assert environ.get("HOME") == (made if expected == "made" else expected and expected.format(tmp=temporary))
    assert environ.get("USER") == (f"uid{UID}" if known is None else None)
    if expected == "made":
        assert Path(made).stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_known", lambda number: None)
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / f"bitfleet-home-{UID}").symlink_to(elsewhere)
    environ: dict[str, str] = {}
    home.have_home(environ)
    assert Path(environ["HOME"]).parent == temporary
    assert not Path(environ["HOME"]).is_symlink()
    home.have_home(environ)  # which is there now
    assert Path(environ["HOME"]).is_dir()


@pytest.mark.skipif(UID != 0, reason="only root can become another user")
def test_a_user_without_name_and_home_has_both() -> None:
    """Run as an unknown user id, in another process."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        # Imports first: the libraries may lie where that user cannot read.
        code = f"""
import getpass, os, pathlib, tempfile
from bitfleet.launch.home import have_home
tempfile.tempdir = {folder!r}
os.setuid(54321)
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
have_home(os.environ)
print(getpass.getuser(), os.access(pathlib.Path.home(), os.W_OK))
"""
        done = run_command([sys.executable, "-c", code])
    assert done.stdout.split() == ["uid54321", "True"]
