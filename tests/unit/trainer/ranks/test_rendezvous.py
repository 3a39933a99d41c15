"""Ranks that meet, that do not come, and that fail before they have met."""

import datetime
import threading
from collections.abc import Callable

import pytest

from bitfleet.trainer.ranks import rendezvous
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.ranks.rendezvous import Meeting, PeerFailed, in_ranks, in_words, loopback_hint
from tests.conftest import free_port

LONG, SHORT = datetime.timedelta(seconds=60), datetime.timedelta(seconds=4)


class Port:
    number = 0


def meeting(rank: int, world_size: int, local_rank: int = 0) -> Meeting:
    return Meeting(Ranks(rank, world_size, local_rank, world_size, master_port=Port.number))


@pytest.fixture(autouse=True)
def address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Port, "number", free_port())
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "TELL_SECONDS", 5.0)


def together(*calls: Callable[[], object]) -> list[object]:
    """Run all calls at once; return what each returns or raises."""
    results: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_ranks_meet() -> None:
    ranks = [meeting(rank, 3) for rank in range(3)]
    together(*(lambda each=each: each.wait_for_all(LONG) for each in ranks))
    assert all(each.is_over for each in ranks)


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "host-a")
    results = together(*(lambda rank=rank: meeting(rank, 4).wait_for_all(SHORT) for rank in (0, 2)))
    for result in results:
        assert isinstance(result, ValueError)
        assert "ranks 1, 3 of 4 did not come to 127.0.0.1:" in str(result)
        assert "within 4 s (there: ranks 0, 2 on host-a): have all hosts started" in str(result)


def test_rank_0_that_does_not_come() -> None:
    with pytest.raises(
        ValueError, match=r"rank 1 has not reached rank 0 at 127.0.0.1:\d+ within 4 s \(Connection refused\)"
    ):
        meeting(1, 2).wait_for_all(SHORT)


def test_after_a_while_one_rank_says_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "QUIET_SECONDS", 1.0)
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "host-a")
    together(*(lambda rank=rank: meeting(rank, 4).wait_for_all(SHORT) for rank in (0, 2)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bitfleet: waiting for ranks 1, 3 of 4 at 127.0.0.1:")
    assert line.endswith("(there: ranks 0, 2 on host-a); the job gives up after 4 s")


def test_after_a_while_the_first_rank_of_a_host_says_that_rank_0_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "QUIET_SECONDS", 1.0)
    for local_rank, said in ((1, 0), (0, 1)):
        with pytest.raises(ValueError, match="rank 1 has not reached rank 0"):
            meeting(1, 2, local_rank).wait_for_all(datetime.timedelta(seconds=2))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == said
        assert all(line.startswith("bitfleet: rank 1 waits for rank 0, which does not answer at ") for line in lines)


def test_port_of_another_job() -> None:
    other = meeting(0, 1)
    other.wait_for_all(LONG)
    with pytest.raises(ValueError, match="rank 0 cannot serve the meeting point .* Pass another --master_port"):
        meeting(0, 2).wait_for_all(SHORT)


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_is_told_to_those_who_wait(failing: int) -> None:
    calls = [lambda rank=rank: meeting(rank, 3).wait_for_all(LONG) for rank in range(3)]
    calls[failing] = lambda: meeting(failing, 3).tell_failure(2, LONG)
    results = together(*calls)
    assert results.pop(failing) is None
    for result in results:
        assert isinstance(result, PeerFailed)
        assert result.code == 2


def test_of_several_failures_one_is_said() -> None:
    results = together(*(lambda rank=rank: meeting(rank, 3).tell_failure(2, LONG) for rank in range(3)))
    assert sum(isinstance(result, PeerFailed) for result in results) == 2
    assert results.count(None) == 1


def test_ranks_with_the_same_gpu() -> None:
    """Both see it as number 0: the one that comes second says so, and the others hear of it."""
    ranks = [meeting(rank, 3) for rank in range(3)]
    gpus = ("GPU-a", "GPU-b", "GPU-a")
    results = together(
        *(
            lambda each=each, gpu=gpu: tell_of_errors(each, lambda: each.wait_for_all(LONG, gpu))
            for each, gpu in zip(ranks, gpus, strict=True)
        )
    )
    (second,) = (result for result in results if isinstance(result, ValueError))
    mine, other = (0, 2) if second is results[0] else (2, 0)
    assert str(second).startswith(f"rank {mine} and rank {other} have the same GPU of ")
    assert str(second).endswith("(GPU-a): start one rank for each GPU")
    assert sum(isinstance(result, PeerFailed) and result.code == 2 for result in results) == 2
    assert not any(each.is_over for each in ranks)


def tell_of_errors(meeting: Meeting, call: Callable[[], object]) -> object:
    """As launch/job.py does."""
    try:
        return call()
    except ValueError:
        meeting.tell_failure(2, LONG)
        raise


def test_ranks_with_a_gpu_each_meet() -> None:
    ranks = [meeting(rank, 2) for rank in range(2)]
    together(*(lambda each=each: each.wait_for_all(LONG, f"GPU-{each.rank}") for each in ranks))
    assert all(each.is_over for each in ranks)


def test_name_that_leads_to_the_host_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise OSError("Name or service not known")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(rendezvous.socket, "gethostbyname", lambda name: {"node1": "10.0.0.1"}[name])
    assert loopback_hint() == ""
    for resolve, where in ((lambda name: "127.0.1.1", "127.0.1.1"), (unknown, "no address")):
        monkeypatch.setattr(rendezvous.socket, "gethostbyname", resolve)
        assert loopback_hint().startswith(f"the name node1 of this host leads to {where}, so other hosts may not")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert loopback_hint() == ""


def test_words() -> None:
    assert [in_words(datetime.timedelta(seconds=each)) for each in (6, 300, 90)] == ["6 s", "5 minutes", "1.5 minutes"]
    assert in_ranks([3]) == "rank 3"
    assert in_ranks(list(range(12))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"
