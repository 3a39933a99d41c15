import os
from pathlib import Path

import pytest

from bitfleet.launch.cluster import hosts
from bitfleet.launch.cluster.hosts import Host, check_reachable, is_here, reachable_address, read_hostfile
from tests.conftest import REPOSITORY


def test_hosts_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# racks\n\nnode2 slots=8\n  node1   slots=4   # old\n")
    assert read_hostfile(path) == [Host("node2", 8), Host("node1", 4)]
    assert read_hostfile(REPOSITORY / "launch" / "cluster" / "hostfile.example") == [Host("node1", 8), Host("node2", 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1 slots=8\nnode2\n", "line 2: .*'node2'"),
        ("node1 slots=8 max-slots=9\n", "line 1: .*node1 slots=8"),
        ("node1:8\n", "line 1: .*node1 slots=8"),
        ("node1 slots=1\n# x\nnode1 slots=2\n", "line 3: node1"),
        ("node1 slots=0\n", "line 1: node1"),
        ("# nobody\n", "hosts"),
    ],
)
def test_bad_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/none"):
        read_hostfile(tmp_path / "none")


FAKE_SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift 2; done
case $1 in
    good*) exec "${@:2}" ;;
    silent) exec sleep 60 ;;
    *) echo "Warning: of something"; echo "$1: Permission denied (publickey)." >&2; exit 255 ;;
esac
"""


def test_hosts_that_ssh_does_not_reach_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text(FAKE_SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check_reachable(["good1", "good2"], "-o BatchMode=yes")
    monkeypatch.setattr(hosts, "SSH_SECONDS", 1.0)
    with pytest.raises(ValueError, match=r" bad \(bad: Permission denied \(publickey\)\.\), silent \(.* 1 s"):
        check_reachable(["good1", "bad", "silent"], "-o BatchMode=yes")
    with pytest.raises(ValueError, match=r" and 2 more: `ssh HOST true`"):
        check_reachable([f"bad{number}" for number in range(5)], "")


def test_own_names() -> None:
    assert is_here("localhost")
    assert is_here("node1", ["node1.site.org"])
    assert is_here("node1.site.org", ["node1.site.org"])
    assert not is_here("node2", ["node1.site.org"])


def test_address_that_others_reach() -> None:
    assert reachable_address("node1", lambda _: "10.0.0.1") == "10.0.0.1"
    assert reachable_address("node1", lambda _: "127.0.1.1") is None  # Debian's /etc/hosts

    def unknown(_: str) -> str:
        raise OSError("no such name")

    assert reachable_address("alias", unknown) is None
