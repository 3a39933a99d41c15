"""Let the ranks of a job find each other, and tell the others if one fails before that.

All ranks meet at torch's key-value store, which rank 0 (or torchrun's agent) serves at MASTER_ADDR
and MASTER_PORT. The wait is bitfleet's own: it names missing ranks, and it ends within seconds when
one of them has failed.
"""

import contextlib
import datetime
import json
import os
import socket
import sys
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from bitfleet.trainer.ranks.collectives import Ranks

_ARRIVED, _ALL, _FAILED, _HEARD = "bitfleet/arrived", "bitfleet/all", "bitfleet/failed", "bitfleet/heard"
POLL_SECONDS = 0.2
QUIET_SECONDS = 10.0
"""Seconds that ranks wait for each other before one of them prints which ranks are missing."""
TELL_SECONDS = 15.0
"""Seconds that a rank which fails at the very start waits for the others, whose imports may take
longer."""


class PeerFailed(Exception):
    """Raised when another rank has failed, which prints why; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Meeting:
    """Connection of this process to the store; every rank of a launched job makes one.

    Args:
        ranks: this process's place.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.address, self.port = ranks.master_addr, ranks.master_port
        self._speaks = ranks.local_rank == 0
        self._store: Store | None = None
        self.is_over = False
        """True once all ranks have met."""

    def store(self, timeout: datetime.timedelta) -> Store:
        """Connect to the store, or serve it; wait for the server at most `timeout`.

        Raises:
            ValueError: no rank serves it, or this rank cannot.
        """
        if self._store is None:
            serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            if not serves:
                self._wait_for_server(timeout)
            try:
                self._store = dist.TCPStore(  # type: ignore[attr-defined]  # a star import
                    self.address, self.port, is_master=serves, timeout=timeout, wait_for_workers=False
                )
            except dist.DistNetworkError as error:
                raise ValueError(
                    f"rank {self.rank} cannot {'serve' if serves else 'reach'} the meeting point "
                    f"{self.address}:{self.port} of "
                    f"the job ({str(error).splitlines()[0]}): is another job using the port? Pass another --master_port"
                ) from None
        return self._store

    def _wait_for_server(self, timeout: datetime.timedelta) -> None:
        """Retry the connection until the store listens; torch's own retry prints stack traces."""
        start = time.monotonic()
        give_up, speaks = start + timeout.total_seconds(), self._speaks
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > give_up:
                    raise ValueError(
                        f"rank {self.rank} has not reached rank 0 at {self.address}:{self.port} within "
                        f"{in_words(timeout)} ({error.strerror or error}): has its host started, can this host reach "
                        "it, and is --master_addr right?"
                    ) from None
                if speaks and time.monotonic() > start + QUIET_SECONDS:
                    speaks = False
                    _say(
                        f"rank {self.rank} waits for rank 0, which does not answer at {self.address}:{self.port} "
                        f"({error.strerror or error}); it gives up after {in_words(timeout)}"
                    )
                time.sleep(POLL_SECONDS)

    def wait_for_all(self, timeout: datetime.timedelta, gpu: str = "") -> Store:
        """Wait until every rank has come; return the store.

        Args:
            timeout: after which it gives up.
            gpu: UUID of the GPU of this rank, which no other rank may have; "" for none.

        Raises:
            ValueError: some have not come within `timeout`; they are named. Or another rank has the
                GPU.
            PeerFailed: one of them has failed.
        """
        store = self.store(timeout)
        start = time.monotonic()
        give_up, is_quiet = start + timeout.total_seconds(), True
        try:
            store.set(f"bitfleet/host/{self.rank}", socket.gethostname())
            self._claim(gpu, store)
            if store.add(_ARRIVED, 1) == self.world_size:
                store.set(_ALL, "")
            while not store.check([_ALL]):
                self.look_for_failure()
                if time.monotonic() > give_up:
                    raise ValueError(self._who_is_missing(store, timeout))
                if is_quiet and time.monotonic() > start + QUIET_SECONDS:
                    is_quiet = False
                    self._say_who_is_missing(store, timeout)
                time.sleep(POLL_SECONDS)
        except dist.DistError as error:
            raise ValueError(
                f"rank {self.rank} lost rank 0 at {self.address}:{self.port} before the job started "
                f"({str(error).splitlines()[0]})"
            ) from None
        self.is_over = True
        return store

    def _claim(self, gpu: str, store: Store) -> None:
        """Raise ValueError if another rank has the GPU, which NCCL would refuse with a traceback on
        every rank."""
        if not gpu:
            return
        owner = int(store.compare_set(f"bitfleet/gpu/{gpu}", "", str(self.rank)))
        if owner != self.rank:
            raise ValueError(
                f"rank {self.rank} and rank {owner} have the same GPU of {socket.gethostname()} ({gpu}): "
                "start one rank for each GPU"
            )

    def look_for_failure(self) -> None:
        """Raise PeerFailed if another rank has told of a failure."""
        assert self._store is not None
        if self._store.check([_FAILED]):
            failure: dict[str, Any] = json.loads(self._store.get(_FAILED))
            if failure["rank"] != self.rank:
                with contextlib.suppress(dist.DistError):  # rank 0 may be leaving
                    self._store.add(_HEARD, 1)
                raise PeerFailed(failure["code"])

    def _missing(self, store: Store) -> tuple[list[int], str]:
        """Return the ranks that are missing, and in words those that have come, by host."""
        hosts: dict[str, list[int]] = {}
        missing: list[int] = []
        for rank in range(self.world_size):
            if store.check([key := f"bitfleet/host/{rank}"]):
                hosts.setdefault(store.get(key).decode(), []).append(rank)
            else:
                missing.append(rank)
        return missing, ", ".join(f"{in_ranks(ranks)} on {host}" for host, ranks in hosts.items())

    def _say_who_is_missing(self, store: Store, timeout: datetime.timedelta) -> None:
        """Print which ranks are missing, once per job: on the lowest rank that has come."""
        missing, came = self._missing(store)
        if missing and all(rank in missing for rank in range(self.rank)):
            _say(
                f"waiting for {in_ranks(missing)} of {self.world_size} at {self.address}:{self.port} (there: {came}); "
                f"the job gives up after {in_words(timeout)}"
            )

    def _who_is_missing(self, store: Store, timeout: datetime.timedelta) -> str:
        missing, came = self._missing(store)
        return (
            f"{in_ranks(missing)} of {self.world_size} did not come to {self.address}:{self.port} within "
            f"{in_words(timeout)} (there: {came}): have all hosts started, and can they reach it?"
        )

    def tell_failure(self, code: int, timeout: datetime.timedelta) -> None:
        """Tell the ranks that wait, or will come, that this one has failed; return when they know,
        or after TELL_SECONDS.

        Args:
            code: exit code of this process.
            timeout: how long to wait for rank 0's store.

        Raises:
            PeerFailed: another rank has told of a failure before.
        """
        with contextlib.suppress(ValueError, dist.DistError):  # there is no store to tell it
            store = self.store(timeout)
            mine = json.dumps({"rank": self.rank, "code": code})
            if store.compare_set(_FAILED, "", mine).decode() != mine:
                self.look_for_failure()
            give_up = time.monotonic() + TELL_SECONDS
            while self.rank == 0 and store.add(_HEARD, 0) < self.world_size - 1 and time.monotonic() < give_up:
                time.sleep(POLL_SECONDS)


def _say(text: str) -> None:
    print(f"bitfleet: {text}", file=sys.stderr, flush=True)


def loopback_hint() -> str:
    """Return what to do if the name of this host resolves to an address that other hosts cannot
    use; "" if it is a good one.

    gloo offers that address to the other ranks, NCCL does not. Debian's /etc/hosts has 127.0.1.1.
    """
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "no address"
    if "GLOO_SOCKET_IFNAME" in os.environ or not address.startswith(("127.", "no ")):
        return ""
    return (
        f"the name {name} of this host leads to {address}, so other hosts may not reach it: on every host export "
        "GLOO_SOCKET_IFNAME with the network's interface (see `ip -brief address`), or correct /etc/hosts"
    )


def in_words(timeout: datetime.timedelta) -> str:
    """Return a timeout in minutes, or in seconds below one: "5 minutes"."""
    seconds = timeout.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"


def in_ranks(ranks: list[int]) -> str:
    """Return "rank 3", or "ranks 2, 3"; of many only the first ones."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
