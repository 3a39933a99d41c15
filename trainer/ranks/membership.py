"""Join this process to the ranks of its job: meet them, compare with them, watch them, and leave
them."""

import dataclasses
import datetime
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from bitfleet.trainer.ranks.check_same import all_facts, check_same_on_all_ranks
from bitfleet.trainer.ranks.collectives import (
    COLLECTIVE_TIMEOUT,
    Ranks,
    all_gather_hosts,
    broadcast_object,
    connect,
    cpu_group,
    gpu_uuid,
    process_group,
)
from bitfleet.trainer.ranks.heartbeat import Heartbeat
from bitfleet.trainer.ranks.rendezvous import Meeting, PeerFailed, loopback_hint

TELL_TIMEOUT = datetime.timedelta(seconds=10)


class Membership:
    """Membership of this process in its job; there is one per process."""

    def __init__(self) -> None:
        self._meeting: Meeting | None = None
        self._heartbeat: Heartbeat | None = None

    @property
    def is_watched(self) -> bool:
        """True once the heartbeat of this process has started."""
        return self._heartbeat is not None

    @contextmanager
    def join(
        self,
        ranks: Ranks,
        device: torch.device,
        versions: Mapping[str, str],
        config: Mapping[str, Any],
        timeout: datetime.timedelta = COLLECTIVE_TIMEOUT,
    ) -> Iterator[Ranks]:
        """Give the process group once all ranks have come and agree; inside, lost ranks are
        noticed.

        Args:
            ranks: this process's place.
            device: where the model runs.
            versions: package -> version; equal on every rank.
            config: the resolved configuration as JSON types, equal on every rank; empty if there is
                none.
            timeout: of the meeting, and of every collective.

        Yields:
            `ranks` with the hosts of all.

        Raises:
            ValueError: a rank does not come, has the GPU of another, or differs from rank 0.
            PeerFailed: a rank has failed before all had met.
        """
        if ranks.world_size == 1:
            with process_group(device, ranks, timeout):
                connect(device)
                yield ranks
            return
        self._meeting = Meeting(ranks)
        store = self._meeting.wait_for_all(timeout, gpu_uuid(device))
        if ranks.local_rank == 0 and ranks.local_world_size < ranks.world_size and (hint := loopback_hint()):
            print(f"bitfleet: warning: {hint}", file=sys.stderr, flush=True)
        with process_group(device, ranks, timeout, store):
            ranks = dataclasses.replace(ranks, hosts=all_gather_hosts())
            self._heartbeat = watch(ranks, self._meeting.address)
            check_same_on_all_ranks(ranks, all_facts(ranks, device, versions, config))
            connect(device)
            yield ranks
            self._heartbeat.stop()

    def others_failed(self, seconds: float) -> int | None:
        """Return the exit code of another rank that fails and prints why; None if none does within
        `seconds`."""
        if self._heartbeat is None:
            time.sleep(seconds)
            return None
        report = self._heartbeat.wait(seconds)
        return report.code if report else None

    def leave(self, code: int, ranks: Ranks) -> int | None:
        """Tell the others that this rank fails.

        Returns:
            The exit code of a rank that told it before, None if this one is the first.
        """
        if self._heartbeat:
            self._heartbeat.leave(code)
            return None
        self._meeting = self._meeting or Meeting(ranks)
        try:
            if not self._meeting.is_over:
                self._meeting.tell_failure(code, TELL_TIMEOUT)
        except PeerFailed as failure:
            return failure.code
        return None


def watch(ranks: Ranks, address: str) -> Heartbeat:
    """Connect every rank with rank 0 and start to watch; every rank calls this.

    Raises:
        ValueError: rank 0 cannot be reached.
    """
    heartbeat = Heartbeat(ranks.rank, ranks.hosts, speaks=ranks.local_rank == 0)
    port, token = broadcast_object(heartbeat.listen() if ranks.is_main else (0, ""), cpu_group("control"))
    if not ranks.is_main:
        heartbeat.connect(address, port, token)
    heartbeat.start()
    return heartbeat


membership = Membership()
