"""Hosts on one machine: network, process, mount, host name and IPC namespaces, joined by cables
(veth pairs) at a switch.

The switch is a bridge in its own network namespace, so nothing of the real machine's network
is touched, and no name can meet that of another lab. Every host has its own address, sshd, /dev/shm
and /run; below /etc and ~/.ssh only its view is changed. A host lives as long as its process
`unshare`, and that as long as this process: nothing is left behind, however the tests end.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

NEEDED = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
SBIN = "/usr/sbin:/sbin"
LEFT_SECONDS = 60.0
"""Seconds after a fault in which all processes of the job must end."""

_INIT = """
hostname "$1"; lab=$2
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$lab/hosts" /etc/hosts
if [ -e /etc/resolv.conf ]; then mount --bind "$lab/resolv.conf" /etc/resolv.conf; fi
mount --bind "$lab/ssh_config" /etc/ssh/ssh_config
if [ -d ~/.ssh ]; then mount --bind "$lab/empty" ~/.ssh; fi
shift 2
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
exec "$(command -v sshd)" -D -e -f "$lab/sshd_config"
"""

_SSH_CONFIG = """Host *
  IdentityFile {lab}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""

_SSHD_CONFIG = """Port 22
HostKey {lab}/key
AuthorizedKeysFile {lab}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
ClientAliveInterval 5
ClientAliveCountMax 3
"""


def missing() -> str:
    """Return why this machine can have no lab, "" if it can."""
    if os.geteuid() != 0:
        return "hosts as namespaces need root"
    path = os.environ["PATH"] + ":" + SBIN
    packages = sorted({package for command, package in NEEDED.items() if shutil.which(command, path=path) is None})
    if packages:
        return f"apt-get install {' '.join(packages)}"
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "--ipc", "true"],
        capture_output=True,
        text=True,
    )
    return f"this root may not make namespaces: {done.stderr.strip()}" if done.returncode else ""


class Lab:
    """Hosts host-a, host-b, ... with the addresses 10.77.0.1, 10.77.0.2, ...

    Args:
        folder: for keys, settings and logs; also the working directory of every command.
        num_hosts: how many.
    """

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.folder = folder
        self.hosts = [f"host-{'abcdefgh'[index]}" for index in range(num_hosts)]
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._write_settings()

    def _write_settings(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "empty").mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "key"], check=True)
        lines = ["127.0.0.1 localhost", *(f"{self.address(host)} {host}" for host in self.hosts)]
        (self.folder / "resolv.conf").write_text("")  # nobody answers here, and nobody should wait for it
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "ssh_config").write_text(_SSH_CONFIG.format(lab=self.folder))
        (self.folder / "sshd_config").write_text(_SSHD_CONFIG.format(lab=self.folder))

    def address(self, host: str) -> str:
        return f"10.77.0.{self.hosts.index(host) + 1}"

    def up(self) -> None:
        """Start the switch and all hosts."""
        self._unshare("switch", "--net", "--", "sleep", "infinity")
        self._ip("switch", "link", "add", "bridge", "type", "bridge")
        self._ip("switch", "link", "set", "bridge", "up")
        for host in self.hosts:
            self.start(host)

    def down(self) -> None:
        """End everything."""
        for name in list(self._started):
            self.stop(name)

    def start(self, host: str, binds: Mapping[Path, Path] | None = None) -> None:
        """Start a host; returns when its sshd answers.

        Args:
            host: its name.
            binds: what it sees at a path that exists: path -> what lies there on this host alone.
        """
        spaces = ("--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc")
        pairs = [str(part) for place, source in (binds or {}).items() for part in (source, place)]
        self._unshare(host, *spaces, "--", "bash", "-euc", _INIT, "init", host, str(self.folder), *pairs)
        self._plug_in(host)
        self._ip(host, "addr", "add", f"{self.address(host)}/24", "dev", "veth0")
        for device in ("lo", "veth0"):
            self._ip(host, "link", "set", device, "up")
        give_up = time.monotonic() + 30
        while self.run(self.hosts[0], "ssh", host, "true").returncode:
            log = (self.folder / f"{host}.log").read_text()
            assert time.monotonic() < give_up, f"the sshd of {host} does not answer: {log}"
            time.sleep(0.1)

    def _plug_in(self, host: str) -> None:
        """Lay a cable from the host to the switch; an earlier one is removed."""
        mac = ("address", f"02:00:00:00:00:{self.hosts.index(host) + 1:02x}")  # the others remember it
        ends = [("netns", str(self._started[name].pid)) for name in (host, "switch")]
        with contextlib.suppress(AssertionError):  # the kernel may have removed it, with the namespace at its other end
            self._ip("switch", "link", "del", host)
        _run("ip", "link", "add", "veth0", *mac, *ends[0], "type", "veth", "peer", "name", host, *ends[1])
        self._ip("switch", "link", "set", host, "master", "bridge", "up")

    def stop(self, name: str) -> None:
        """End a host (or the switch) at once, as a power cut does to its processes."""
        process = self._started.pop(name)
        process.kill()
        process.wait()

    def kill(self, host: str) -> None:
        """SIGKILL of the host's first process, which takes all others with it."""
        os.kill(self._first_process(host), signal.SIGKILL)
        self._started.pop(host).wait()

    def cable(self, host: str, state: str) -> None:
        """Pull the cable of a host out of the switch ("down"), or put it back ("up")."""
        self._ip("switch", "link", "set", host, state)

    def throttle(self, host: str, rate: str | None) -> None:
        """Let a host send no faster than `rate` ("20mbit"); None: as fast as it can."""
        change = ("add", "dev", "veth0", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms")
        self._in_network(host, "tc", "qdisc", *(change if rate else ("del", "dev", "veth0", "root")))

    def sent_bytes(self, host: str) -> int:
        """Return the bytes that a host has sent through its cable since its start."""
        return int(self.run(host, "cat", "/sys/class/net/veth0/statistics/tx_bytes").stdout or self._sent(host))

    def _sent(self, host: str) -> str:
        done = self._in_network(host, "ip", "-s", "-o", "link", "show", "dev", "veth0")
        return done.split("TX:")[1].split("\\")[1].split()[0]

    def command(self, host: str, *command: str | Path) -> list[str]:
        """Return the command of this machine that runs `command` inside a host."""
        inside = ["nsenter", "-t", str(self._first_process(host)), "--mount", "--uts", "--ipc", "--net", "--pid"]
        return [*inside, f"--wd={self.folder}", "--", *map(str, command)]

    def run(self, host: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a short command inside a host."""
        return subprocess.run(self.command(host, *command), capture_output=True, text=True, timeout=60)

    def processes(self, host: str, word: str) -> list[int]:
        """Return the processes of a host with `word` in their command line (ids of this machine),
        the oldest first: ids begin again when they have come to the highest."""
        space = os.readlink(f"/proc/{self._first_process(host)}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                inside = entry.name.isdecimal() and os.readlink(entry / "ns/pid") == space
                if inside and word in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append((_start(entry), int(entry.name)))
        return [pid for _, pid in sorted(found)]

    def clear(self, word: str) -> None:
        """Kill processes of a job that a failed test has left on the hosts."""
        for host in self.hosts:
            for pid in self.processes(host, word):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait_until_gone(self, host: str, word: str, since: float) -> float:
        """Wait until no process of a host has `word` in its command line; return the seconds since
        `since`."""
        while left := self.processes(host, word):
            assert time.monotonic() - since < LEFT_SECONDS, f"left on {host}: {left}"
            time.sleep(0.1)
        return time.monotonic() - since

    def _first_process(self, host: str) -> int:
        pid = self._started[host].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _unshare(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=os.environ | {"PATH": f"{os.environ['PATH']}:{SBIN}"},
            )
        self._started[name] = process
        own = os.readlink("/proc/self/ns/net")
        while process.poll() is None and os.readlink(f"/proc/{process.pid}/ns/net") == own:
            time.sleep(0.01)
        assert process.poll() is None, (self.folder / f"{name}.log").read_text()

    def _in_network(self, name: str, *command: str) -> str:
        return _run("nsenter", "-t", str(self._started[name].pid), "--net", "--", *command)

    def _ip(self, name: str, *arguments: str) -> None:
        self._in_network(name, "ip", *arguments)


def _start(process: Path) -> int:
    """Return when a process of /proc started, in clock ticks since boot."""
    return int((process / "stat").read_text().rpartition(")")[2].split()[19])


def _run(*command: str) -> str:
    path = f"{os.environ['PATH']}:{SBIN}"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def lab(folder: Path, num_hosts: int = 2) -> Iterator[Lab]:
    """A running lab."""
    made = Lab(folder, num_hosts)
    try:
        made.up()
        yield made
    finally:
        made.down()
