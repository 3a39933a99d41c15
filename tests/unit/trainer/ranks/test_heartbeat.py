"""Heartbeats between the threads of one process: which rank is lost, which reports it, and with
which exit code the others leave."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from bitfleet.trainer.ranks import heartbeat
from bitfleet.trainer.ranks.heartbeat import HangReport, Heartbeat

HOSTS = ["host-a", "host-a", "host-b", "host-b"]


class Ended:
    """Stand in for os._exit."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.event = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.event.set()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("BEAT_SECONDS", 0.1),
        ("SILENT_SECONDS", 2.0),
        ("GATHER_SECONDS", 0.5),
        ("GRACE_SECONDS", 0.2),
    ):
        monkeypatch.setattr(heartbeat, name, seconds)


@pytest.fixture
def ended() -> Ended:
    return Ended()


@pytest.fixture
def job(ended: Ended) -> Iterator[list[Heartbeat]]:
    """Ranks 0 to 2; the test itself is rank 3."""
    ranks = [Heartbeat(rank, HOSTS, speaks=rank % 2 == 0, end=ended) for rank in range(3)]
    port, token = ranks[0].listen()
    for each in ranks:
        if each.rank:
            each.connect("127.0.0.1", port, token)
        each.start()
    yield ranks
    for each in ranks:
        each.stop()
        each._thread.join(10)
        assert not each._thread.is_alive()


def join(first: Heartbeat, step: int = 6) -> socket.socket:
    assert first._listener is not None
    connection = socket.create_connection(("127.0.0.1", first._listener.getsockname()[1]))
    for message in ({"rank": 3, "token": first.token}, {"step": step}):
        connection.sendall(json.dumps(message).encode() + b"\n")
    while 3 not in first._peers or not first._peers[3].step:
        time.sleep(0.01)
    return connection


def test_closed_connection_is_a_lost_rank(
    job: list[Heartbeat], ended: Ended, capsys: pytest.CaptureFixture[str]
) -> None:
    join(job[0]).close()
    assert job[0].wait(10) == HangReport(
        1,
        "lost rank 3 on host-b in step 7: its process ended without a word (killed, out of memory, or its host "
        "went down)",
    )
    assert [each.wait(10) for each in job[1:]] == [HangReport(1, "")] * 2
    assert ended.event.wait(10)
    assert capsys.readouterr().err == f"bitfleet: error: {job[0].report.sentence}\n"  # type: ignore[union-attr]


def test_silence_is_a_lost_rank(job: list[Heartbeat], ended: Ended) -> None:
    with join(job[0]):
        verdict = job[0].wait(20)
    assert verdict is not None
    assert verdict.sentence.startswith("lost rank 3 on host-b in step 7: nothing has come from it for 2 s")


def test_host_is_named_when_all_its_ranks_go(job: list[Heartbeat], ended: Ended) -> None:
    connection = join(job[0])
    job[0]._peers[2].connection.shutdown(socket.SHUT_RDWR)  # as if rank 2 were gone
    connection.close()
    verdict = job[0].wait(10)
    assert verdict is not None
    assert verdict.sentence.startswith("lost the host host-b (ranks 2, 3) in step ")


def test_a_rank_that_says_why_it_leaves_is_not_lost(
    job: list[Heartbeat], ended: Ended, capsys: pytest.CaptureFixture[str]
) -> None:
    job[2].leave(7)
    assert [each.wait(10) for each in job] == [HangReport(7, "")] * 3
    assert capsys.readouterr().err == ""
    assert ended.event.wait(10)
    assert set(ended.codes) == {7}


def test_end_of_the_job_is_no_loss(job: list[Heartbeat], ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    for each in job[::-1]:
        each.stop()
    time.sleep(1.0)
    assert ended.codes == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "hello", [b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 3, "token": "guessed"}\n', b'{"rank": 3}\n', b"3\n", b""]
)
def test_strangers_are_sent_away(hello: bytes, job: list[Heartbeat]) -> None:
    assert job[0]._listener is not None
    with socket.create_connection(("127.0.0.1", job[0]._listener.getsockname()[1])) as stranger:
        stranger.settimeout(10)
        stranger.sendall(hello)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
    assert job[0].wait(0.5) is None
    assert set(job[0]._peers) == {1, 2}


def test_port_that_cannot_be_reached_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ValueError, match=f"rank 2 on host-b .*{port} .*rank 0 .*127.0.0.1"):
        Heartbeat(2, HOSTS, speaks=True).connect("127.0.0.1", port, "word")
