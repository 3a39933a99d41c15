"""Measure and judge clocks, latency and bandwidth between ranks, with few bytes and in little
time."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from bitfleet.launch.doctor.checks import Check, judge, who
from bitfleet.launch.doctor.facts import Facts
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_tensors, barrier, broadcast_object, receive, send

PING_COUNT, TRANSFER_COUNT = 7, 3
TRANSFER_BYTES, LEAST_BYTES = 4 << 20, 1 << 16
TRANSFER_SECONDS = 0.3
"""Limit of a transfer, which is made with fewer bytes if it would take longer."""
BUDGET_SECONDS = 10.0
"""Ranks whose turn comes later than this are left out."""
CLOCK_SECONDS, LATENCY_SECONDS = 1.0, 0.005
SLOW_BYTES_PER_SECOND = 100e6
"""Below 1 Gbit/s."""
SLOWER_THAN_MEDIAN = 0.5


class Pair(NamedTuple):
    """Measurements between rank 0 and another one."""

    rank: int
    latency_seconds: float
    """Half of the median round trip of 8 bytes."""
    clock_seconds: float
    """Clock of the rank minus clock of rank 0."""
    bytes_per_second: float
    """Median of transfers there and back."""


class Network(NamedTuple):
    """Measurements, the same on every rank."""

    pairs: list[Pair]
    ring_bytes_per_second: float
    """Bytes per second that each rank sends in an all-gather over all ranks."""


def measure_network(ranks: Ranks, device: torch.device, clock: Callable[[], float] = time.time) -> Network | None:
    """Measure rank 0 against each other rank in turn, then all together; every rank calls this.
    None for a single rank.

    Args:
        ranks: this process's place.
        device: where the tensors are that are sent.
        clock: the clock of this rank, in seconds.
    """
    if ranks.world_size == 1:
        return None
    barrier()
    pairs: list[Pair] = []
    start = time.monotonic()
    for peer in range(1, ranks.world_size):
        if ranks.is_main:
            is_late = time.monotonic() - start > BUDGET_SECONDS
            pair = _lead(peer, device, clock, leave_out=is_late)
            if pair is not None:
                pairs.append(pair)
        elif ranks.rank == peer:
            _answer(device, clock)
    barrier()
    slowest = min((pair.bytes_per_second for pair in pairs), default=1e9)
    num_bytes = broadcast_object(max(LEAST_BYTES, min(TRANSFER_BYTES, int(slowest * TRANSFER_SECONDS))) // 8 * 8)
    rates = [_ring(num_bytes // ranks.world_size // 8 * 8 + 8, ranks, device) for _ in range(TRANSFER_COUNT + 1)]
    return broadcast_object(Network(pairs, statistics.median(rates[1:])))


def _lead(peer: int, device: torch.device, clock: Callable[[], float], *, leave_out: bool) -> Pair | None:
    """Measure as rank 0, which announces the number of bytes that follow; 0 ends the turn."""
    if leave_out:
        _announce(0, peer, device)
        return None
    ping = torch.zeros(1, dtype=torch.float64, device=device)
    trips, offsets = [], []
    for _ in range(PING_COUNT + 1):
        _announce(1, peer, device)
        sent_at = clock()
        start = time.perf_counter()
        send(ping, peer)
        answered_at = float(receive(ping, peer))
        trips.append(time.perf_counter() - start)
        offsets.append(answered_at - (sent_at + trips[-1] / 2))
    trips, offsets = trips[1:], offsets[1:]  # the first one opens the connection
    num_bytes, rates = LEAST_BYTES, list[float]()
    while len(rates) < TRANSFER_COUNT:
        _announce(num_bytes, peer, device)
        data = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        start = time.perf_counter()
        send(data, peer)
        receive(data, peer)
        rate = 2 * num_bytes / (time.perf_counter() - start)
        if num_bytes == LEAST_BYTES and (wanted := min(TRANSFER_BYTES, int(rate * TRANSFER_SECONDS))) > LEAST_BYTES:
            num_bytes = wanted
        else:
            rates.append(rate)
    _announce(0, peer, device)
    best = min(range(PING_COUNT), key=trips.__getitem__)
    return Pair(peer, statistics.median(trips) / 2, offsets[best], statistics.median(rates))


def _announce(num_bytes: int, peer: int, device: torch.device) -> None:
    send(torch.tensor([num_bytes], dtype=torch.int64, device=device), peer)


def _answer(device: torch.device, clock: Callable[[], float]) -> None:
    """Answer rank 0: 1 byte asks for the clock, more for as many bytes back."""
    ping = torch.zeros(1, dtype=torch.float64, device=device)
    announced = torch.zeros(1, dtype=torch.int64, device=device)
    while num_bytes := int(receive(announced, 0)):
        if num_bytes == 1:
            receive(ping, 0)
            ping.fill_(clock())
            send(ping, 0)
        else:
            send(receive(torch.empty(num_bytes, dtype=torch.uint8, device=device), 0), 0)


def _ring(num_bytes: int, ranks: Ranks, device: torch.device) -> float:
    """Return the bytes per second that each rank sends in an all-gather of `num_bytes` of each."""
    own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    barrier()
    start = time.perf_counter()
    int(all_gather_tensors(own)[0][0])  # waits for the device
    return (ranks.world_size - 1) * num_bytes / (time.perf_counter() - start)


def check_network(facts: Sequence[Facts], network: Network) -> Iterator[Check]:
    """Check the clocks of the hosts, and latency and bandwidth between rank 0 and the others and
    among all."""

    def ends(pair: Pair) -> str:
        return f"{who([facts[0]])} and {who([facts[pair.rank]])}"

    offsets = {0: 0.0} | {pair.rank: pair.clock_seconds for pair in network.pairs}
    first, last = min(offsets, key=offsets.__getitem__), max(offsets, key=offsets.__getitem__)
    missing, apart = len(facts) - len(offsets), offsets[last] - offsets[first]
    left_out = f" ({missing} ranks were left out, the time was over)" if missing else ""
    advice = f"{who([facts[last]])} is ahead of {who([facts[first]])}: run chrony or ntpd on every host"
    yield judge("clocks", f"{milliseconds(apart)} apart at most{left_out}", advice if apart > CLOCK_SECONDS else "")

    median = statistics.median(pair.latency_seconds for pair in network.pairs)
    slowest = max(network.pairs, key=lambda pair: pair.latency_seconds)
    value = f"median {milliseconds(median)}, most {milliseconds(slowest.latency_seconds)}: {ends(slowest)}"
    is_slow = slowest.latency_seconds > LATENCY_SECONDS
    yield judge("latency", value, "a slow network or a busy host: compare with ping" if is_slow else "")

    median = statistics.median(pair.bytes_per_second for pair in network.pairs)
    slowest = min(network.pairs, key=lambda pair: pair.bytes_per_second)
    value = (
        f"median {rate(median)}, least {rate(slowest.bytes_per_second)}: {ends(slowest)}; "
        f"each rank in an all-gather {rate(network.ring_bytes_per_second)}"
    )
    advice = ""
    if slowest.bytes_per_second < SLOW_BYTES_PER_SECOND:
        advice = "less than 1 Gbit/s: is it the right interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)?"
    elif slowest.bytes_per_second < SLOWER_THAN_MEDIAN * median and facts[0].host != facts[slowest.rank].host:
        advice = "this link is slower than the others, and sets the pace of all"
    yield judge("bandwidth", value, advice)


def milliseconds(seconds: float) -> str:
    """Return "2 ms", from 1 s on "1.0 s"."""
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms"


def rate(bytes_per_second: float) -> str:
    """Return "100 MB/s"."""
    return f"{bytes_per_second / 1e6:,.0f} MB/s"
