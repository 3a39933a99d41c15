"""A thread in every rank that notices when another one is gone, whatever the process itself is waiting for.

Every rank holds a TCP connection to rank 0 and says each second which step it is in. A connection that closes, or from which
nothing has come for SILENT_SECONDS (a host without power, a cut cable, a stopped process), is a lost rank; rank 0 says so and
tells the others, and all leave. It depends neither on gloo nor on NCCL, whose own timeout has to be as long as the slowest step.
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
"""When a host goes, its ranks go one after another: so long the first one's loss waits for the others."""
GRACE_SECONDS = 10.0
"""How long the main thread of a rank has to leave by itself, once the job is lost: a save may be under way."""
CLOSE_SECONDS = 2.0
"""How long a rank that leaves waits until the others have read that it does."""


STRANGER = -1


class Verdict(NamedTuple):
    """Why the job ends: the exit code, and the sentence that was said (by another rank: "")."""

    code: int
    sentence: str


class _Reached:
    step = 0


def reached(step: int) -> None:
    """This rank has done `step` optimizer steps."""
    _Reached.step = step


class _Peer:
    """A connection, and what has come through it."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        self.connection, self.rank = connection, rank
        self.heard_at = time.monotonic()
        self.step = 0
        self.ended = False
        """It has said that it leaves."""
        self._text = b""

    def send(self, **message: Any) -> None:
        """A peer that takes nothing more is noticed by its silence."""
        try:
            self.connection.send(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None when the connection is closed."""
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
    """Watches the job from this rank; `start` begins.

    Args:
        rank: of this process.
        hosts: the host of every rank.
        speaks: whether this rank says that rank 0 is gone (one rank a host is enough).
        end: called with the exit code when the main thread has not left in time.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], *, speaks: bool, end: Callable[[int], object] = os._exit
    ) -> None:
        self.rank, self._hosts, self._speaks, self._end = rank, hosts, speaks, end
        self.token = secrets.token_hex(16)
        self.verdict: Verdict | None = None
        self._judged, self._closed = threading.Event(), threading.Event()
        self._leaving: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
        self._peers: dict[int, _Peer] = {}
        self._lost: dict[int, str] = {}
        self._lost_at = 0.0
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def listen(self) -> tuple[int, str]:
        """On rank 0: listen on a free port; returns it and the word that the others must say."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024
        )
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        return self._listener.getsockname()[1], self.token

    def connect(self, address: str, port: int, token: str) -> None:
        """On the other ranks: connect to rank 0.

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
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """The job has ended well: whoever leaves now is not lost."""
        self._stopping = True
        self._leave(Verdict(0, ""), CLOSE_SECONDS)

    def leave(self, code: int) -> None:
        """This rank fails and has said why: tell the others, so that they leave quietly with its exit code."""
        if self.verdict is None:
            self._leave(Verdict(code, ""), CLOSE_SECONDS)

    def wait(self, seconds: float) -> Verdict | None:
        """Wait for the end of the job as the heartbeat sees it; None if it does not come within `seconds`."""
        self._judged.wait(seconds)
        return self.verdict

    def _leave(self, verdict: Verdict, seconds: float) -> None:
        self._leaving.put(verdict)
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
            if now - seen_at > SILENT_SECONDS / 2:  # it was this process that stood still
                for peer in self._peers.values():
                    peer.heard_at += now - seen_at
            seen_at = now
            if now - beat_at >= BEAT_SECONDS:
                beat_at = now
                self._beat(now)
            if self.verdict is None and self._lost and now - self._lost_at >= GATHER_SECONDS:
                self._say_loss()
            if not self._leaving.empty():
                self._judge(self._leaving.get())
            if self.verdict is not None:
                self._close()
                return

    def _accept(self) -> None:
        """Anybody may knock: who it is, the first message says."""
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection, STRANGER))

    def _greet(self, peer: _Peer) -> None:
        """A stranger whose first message has the right word becomes a peer, any other one is sent away."""
        try:
            messages = peer.receive()
            if messages == []:
                return
            hello = (messages or [{}])[0]
            peer.rank = int(hello["rank"]) if secrets.compare_digest(str(hello["token"]), self.token) else STRANGER
        except (ValueError, KeyError, TypeError):
            peer.rank = STRANGER
        if peer.rank == STRANGER:
            self._drop(peer)
        else:
            self._peers[peer.rank] = peer
            self._take(peer, messages[1:] if messages else [])

    def _hear(self, peer: _Peer) -> None:
        if peer.rank == STRANGER:
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
                    self._judge(Verdict(message["leaves"], ""))

    def _beat(self, now: float) -> None:
        for peer in list(self._peers.values()):
            peer.send(step=_Reached.step)
            if now - peer.heard_at > SILENT_SECONDS and not peer.ended:
                self._drop(peer)
                self._lose(
                    peer,
                    f"nothing has come from it for {SILENT_SECONDS:g} s (its host is down, its network is cut, or its "
                    "process stands still)",
                )

    def _lose(self, peer: _Peer, why: str) -> None:
        if not self._lost:
            self._lost_at = time.monotonic()
        step = max(peer.step, _Reached.step) + 1  # ranks go in step; this one's number is never late
        self._lost[peer.rank] = f"in step {step}: {why}"

    def _say_loss(self) -> None:
        first = min(self._lost)
        host = self._hosts[first]
        ranks = sorted(rank for rank in self._lost if self._hosts[rank] == host)
        sentence = f"lost {in_ranks(ranks)} on {host} {self._lost[first]}"
        if self._hosts.count(host) == len(ranks) < len(self._hosts):
            sentence = f"lost the host {host} ({in_ranks(ranks)}) {self._lost[first]}"
        if self.rank == 0 or self._speaks:
            print(error_line(sentence), file=sys.stderr, flush=True)
        self._judge(Verdict(CRASH, sentence))

    def _judge(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self._judged.set()

    def _close(self) -> None:
        """Tell the others, wait until they have read it, then end the process if its main thread does not."""
        assert self.verdict is not None
        for peer in self._peers.values():
            peer.send(leaves=self.verdict.code)
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
        for key in list(self._selector.get_map().values()):  # the listener, and strangers
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]  # a socket
        self._selector.close()
        self._closed.set()
        if self.verdict.code:
            time.sleep(GRACE_SECONDS)
            self._end(self.verdict.code)
