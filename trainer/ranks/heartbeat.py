"""Notice in a thread of every rank when another rank is gone, even if the process itself waits in a
collective.

Every rank holds a TCP connection to rank 0 and sends each second which step it is in. A connection
that closes, or that is silent for SILENT_SECONDS (a host without power, a cut cable, a stopped
process), is a lost rank; rank 0 reports it and tells the others, and all exit. It does not depend
on gloo or NCCL, whose own timeout has to be as long as the slowest step.
"""

import json
import os
import queue
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bitfleet.trainer.ranks.exit_codes import CRASH, error_line
from bitfleet.trainer.ranks.rendezvous import in_ranks

BEAT_SECONDS = 1.0
SILENT_SECONDS = 20.0
GATHER_SECONDS = 1.0
"""Seconds that the first loss waits for further ones: when a host goes down, its ranks go one after
another."""
GRACE_SECONDS = 10.0
"""Seconds that the main thread of a rank has to exit by itself once the job is lost: a save may be
in progress."""
CLOSE_SECONDS = 2.0
"""Seconds that a rank which exits waits until the others have read its message."""


UNKNOWN = -1


class HangReport(NamedTuple):
    """Reason for the end of the job: exit code, and the sentence that was printed ("" if another
    rank prints it)."""

    code: int
    sentence: str


class _Progress:
    step = 0


def report_step(step: int) -> None:
    """Report that this rank has done `step` optimizer steps."""
    _Progress.step = step


class _Peer:
    """Connection to another rank, and the state that it has sent."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        self.connection, self.rank = connection, rank
        self.heard_at = time.monotonic()
        self.step = 0
        self.ended = False
        """It has sent that it exits."""
        self._text = b""

    def send(self, **message: Any) -> None:
        """Send a message; a peer that receives nothing more is noticed by its silence."""
        try:
            self.connection.send(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have arrived; None when the connection is closed."""
        try:
            part = self.connection.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not part:
            return None
        self.heard_at = time.monotonic()
        *lines, self._text = (self._text + part).split(b"\n")
        return [json.loads(line) for line in lines]


class Heartbeat:
    """Watches the job from this rank, from `start` to `stop`.

    Args:
        rank: of this process.
        hosts: host of every rank.
        speaks: whether this rank reports that rank 0 is gone (one rank per host is enough).
        end: called with the exit code when the main thread has not exited in time.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], *, speaks: bool, end: Callable[[int], object] = os._exit
    ) -> None:
        self.rank, self._hosts, self._speaks, self._end = rank, hosts, speaks, end
        self.token = secrets.token_hex(16)
        self.report: HangReport | None = None
        self._ended, self._closed = threading.Event(), threading.Event()
        self._leaving: queue.SimpleQueue[HangReport] = queue.SimpleQueue()
        self._peers: dict[int, _Peer] = {}
        self._lost: dict[int, str] = {}
        self._lost_at = 0.0
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def listen(self) -> tuple[int, str]:
        """Listen on a free port (rank 0). Return the port and a token that clients must present."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024
        )
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        return self._listener.getsockname()[1], self.token

    def connect(self, address: str, port: int, token: str) -> None:
        """Connect to rank 0 (all other ranks).

        Raises:
            ValueError: its port cannot be reached.
        """
        try:
            connection = socket.create_connection((address, port), timeout=SILENT_SECONDS)
        except OSError as error:
            raise ValueError(
                f"rank {self.rank} on {self._hosts[self.rank]} cannot reach port {port} of rank 0 at {address} "
                f"({error.strerror or error}): open the ports between the hosts of the job"
            ) from None
        peer = self._add(connection, 0)
        peer.send(rank=self.rank, token=token)

    def start(self) -> None:
        """Start to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to watch at the end of a successful job: a rank that exits now is not lost."""
        self._stopping = True
        self._leave(HangReport(0, ""), CLOSE_SECONDS)

    def leave(self, code: int) -> None:
        """Tell the others that this rank fails and has printed why, so that they exit quietly with
        its exit code."""
        if self.report is None:
            self._leave(HangReport(code, ""), CLOSE_SECONDS)

    def wait(self, seconds: float) -> HangReport | None:
        """Wait up to `seconds` for the end of the job as the heartbeat sees it; None if it does not
        end."""
        self._ended.wait(seconds)
        return self.report

    def _leave(self, report: HangReport, seconds: float) -> None:
        self._leaving.put(report)
        self._closed.wait(seconds)

    def _add(self, connection: socket.socket, rank: int) -> _Peer:
        peer = self._peers[rank] = _Peer(connection, rank)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if self._peers.get(peer.rank) is peer:
            del self._peers[peer.rank]

    # The thread.

    def _run(self) -> None:
        beat_at = seen_at = time.monotonic()
        while True:
            for key, _ in self._selector.select(BEAT_SECONDS / 4):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if now - seen_at > SILENT_SECONDS / 2:  # this process itself was stopped
                for peer in self._peers.values():
                    peer.heard_at += now - seen_at
            seen_at = now
            if now - beat_at >= BEAT_SECONDS:
                beat_at = now
                self._beat(now)
            if self.report is None and self._lost and now - self._lost_at >= GATHER_SECONDS:
                self._say_loss()
            if not self._leaving.empty():
                self._end_job(self._leaving.get())
            if self.report is not None:
                self._close()
                return

    def _accept(self) -> None:
        """Accept any connection; the first message identifies the rank."""
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection, UNKNOWN))

    def _greet(self, peer: _Peer) -> None:
        """Add a connection whose first message has the token as a peer, and close any other one."""
        try:
            messages = peer.receive()
            if messages == []:
                return
            hello = (messages or [{}])[0]
            peer.rank = int(hello["rank"]) if secrets.compare_digest(str(hello["token"]), self.token) else UNKNOWN
        except (ValueError, KeyError, TypeError):
            peer.rank = UNKNOWN
        if peer.rank == UNKNOWN:
            self._drop(peer)
        else:
            self._peers[peer.rank] = peer
            self._take(peer, messages[1:] if messages else [])

    def _hear(self, peer: _Peer) -> None:
        if peer.rank == UNKNOWN:
            self._greet(peer)
            return
        messages = peer.receive()
        self._take(peer, messages or [])
        if messages is None:
            self._drop(peer)
            if not peer.ended and not self._stopping:
                self._lose(peer, "its process ended without a word (killed, out of memory, or its host went down)")

    def _take(self, peer: _Peer, messages: Sequence[dict[str, Any]]) -> None:
        for message in messages:
            peer.step = message.get("step", peer.step)
            if "leaves" in message:
                peer.ended = True
                if message["leaves"]:
                    self._end_job(HangReport(message["leaves"], ""))

    def _beat(self, now: float) -> None:
        for peer in list(self._peers.values()):
            peer.send(step=_Progress.step)
            if now - peer.heard_at > SILENT_SECONDS and not peer.ended:
                self._drop(peer)
                self._lose(
                    peer,
                    f"nothing has come from it for {SILENT_SECONDS:g} s (its host is down, its network is cut, or its "
                    "process stands still)",
                )

    def _lose(self, peer: _Peer, reason: str) -> None:
        if not self._lost:
            self._lost_at = time.monotonic()
        step = max(peer.step, _Progress.step) + 1  # ranks go in step; this one's number is never late
        self._lost[peer.rank] = f"in step {step}: {reason}"

    def _say_loss(self) -> None:
        first = min(self._lost)
        host = self._hosts[first]
        ranks = sorted(rank for rank in self._lost if self._hosts[rank] == host)
        sentence = f"lost {in_ranks(ranks)} on {host} {self._lost[first]}"
        if self._hosts.count(host) == len(ranks) < len(self._hosts):
            sentence = f"lost the host {host} ({in_ranks(ranks)}) {self._lost[first]}"
        if self.rank == 0 or self._speaks:
            print(error_line(sentence), file=sys.stderr, flush=True)
        self._end_job(HangReport(CRASH, sentence))

    def _end_job(self, report: HangReport) -> None:
        if self.report is None:
            self.report = report
            self._ended.set()

    def _close(self) -> None:
        """Tell the others, wait until they have read it, then end the process if its main thread
        does not exit."""
        assert self.report is not None
        for peer in self._peers.values():
            peer.send(leaves=self.report.code)
        give_up = time.monotonic() + CLOSE_SECONDS
        for peer in list(self._peers.values()):
            try:
                peer.connection.shutdown(socket.SHUT_WR)
                peer.connection.settimeout(max(give_up - time.monotonic(), 0.01))
                while peer.connection.recv(65536):  # closing over unread bytes would reset the connection
                    pass
            except OSError:
                pass
            self._drop(peer)
        for key in list(self._selector.get_map().values()):  # the listener, and connections without a rank
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]  # a socket
        self._selector.close()
        self._closed.set()
        if self.report.code:
            time.sleep(GRACE_SECONDS)
            self._end(self.report.code)
