"""Start and watch a training job on the hosts of a lab as a user would: by `deepspeed --hostfile`,
from one of them."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import BIN, REPOSITORY
from tests.multinode.lab import LEFT_SECONDS, SBIN, Lab


class HostJob:
    """A job that `deepspeed --hostfile` started on the first host of a lab; it runs
    tests/faults/job.py.

    Args:
        lab: the hosts.
        ranks_per_host: as in the hostfile.
        hosts: which; None: all.
        options: of training.
        environment: for every rank.
    """

    SCRIPT = REPOSITORY / "tests/faults/job.py"

    def __init__(
        self,
        lab: Lab,
        ranks_per_host: int,
        options: Sequence[str | Path],
        *,
        hosts: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.lab = lab
        self.progress = lab.folder / "progress"
        self.progress.unlink(missing_ok=True)
        travels = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "BITFLEET_CACHE": os.environ["BITFLEET_CACHE"],
            "BITFLEET_PROGRESS": str(self.progress),
            **(environment or {}),
        }
        (lab.folder / ".deepspeed_env").write_text(
            "".join(f"{key}={_quoted(value)}\n" for key, value in travels.items())
        )
        hostfile = lab.folder / "hostfile"
        hostfile.write_text("".join(f"{host} slots={ranks_per_host}\n" for host in hosts or lab.hosts))
        launcher = [BIN / "deepspeed", "--force_multi", "--hostfile", hostfile]
        launcher += ["--master_addr", lab.address(lab.hosts[0])]
        own = {"PATH", "HOME", "LANG", "TMPDIR"}
        self.started_at = time.monotonic()
        self._log = lab.folder / "terminal"
        with self._log.open("wb") as terminal:
            self.process = subprocess.Popen(
                lab.command(lab.hosts[0], *launcher, self.SCRIPT, *options),
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=subprocess.STDOUT,
                env={key: value for key, value in os.environ.items() if key in own}
                | {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "PATH": f"{BIN}:{os.environ['PATH']}:{SBIN}"},
            )

    @property
    def output(self) -> str:
        """Output so far in the launching terminal."""
        return self._log.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        """Error lines of the output."""
        return [line for line in self.output.splitlines() if "bitfleet: error" in line]

    def wait_for_step(self, step: int, seconds: float = 120.0) -> None:
        """Wait until `step` steps are done."""
        give_up = time.monotonic() + seconds
        while not self.progress.exists() or int(self.progress.read_text() or 0) < step:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < give_up, self.output
            time.sleep(0.05)

    def wait_for_error(self, seconds: float = 180.0) -> float:
        """Wait until the terminal has an error line; return the time."""
        give_up = time.monotonic() + seconds
        while not self.errors:
            assert self.process.poll() is None or self.errors, self.output
            assert time.monotonic() < give_up, self.output
            time.sleep(0.05)
        return time.monotonic()

    def wait(self, seconds: float = 180.0) -> int:
        """Wait for the end of the launching command; return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

    def ends_everywhere(self, since: float, *hosts: str) -> int:
        """Wait for the end of the command and of its processes on `hosts`; return its exit code.
        Prints times."""
        code = self.wait(LEFT_SECONDS)
        seconds = {"command": time.monotonic() - since}
        for host in hosts:
            seconds[host] = self.lab.wait_until_gone(host, self.SCRIPT.name, since)
        print(f"exit code {code}; gone after", {name: f"{value:.1f} s" for name, value in seconds.items()})
        print(*self.errors, sep="\n")
        sys.stdout.flush()
        return code


def _quoted(value: str) -> str:
    """Escape a value that DeepSpeed puts between double quotes."""
    return value.replace('"', '\\"')
