"""How fast the ranks reach each other, and how far their clocks are apart; measured within bounds of bytes and of time."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bitfleet.trainer.ranks.collectives import Ranks, barrier, from_first_rank, gather_from_ranks, receive, send

PING_COUNT, TRANSFER_COUNT = 7, 3
TRANSFER_BYTES, LEAST_BYTES = 4 << 20, 1 << 16
TRANSFER_SECONDS = 0.3
"""A transfer that would take longer is made with fewer bytes."""
BUDGET_SECONDS = 10.0
"""Ranks whose turn comes later than this are left out."""


class Pair(NamedTuple):
    """Rank 0 and another one."""

    rank: int
    latency_seconds: float
    """Half of the median round trip of 8 bytes."""
    clock_seconds: float
    """Clock of the rank minus clock of rank 0."""
    bytes_per_second: float
    """There and back, the median."""


class Network(NamedTuple):
    """What was measured; the same on every rank."""

    pairs: list[Pair]
    ring_bytes_per_second: float
    """What a rank sends in an all-gather over all ranks."""


def measure_network(ranks: Ranks, device: torch.device, clock: Callable[[], float] = time.time) -> Network | None:
    """Measure rank 0 against each other rank in turn, then all together; every rank calls this. None for a single rank.

    Args:
        ranks: this process's place.
        device: whose links carry the data.
        clock: of this rank, in seconds.
    """
    if ranks.world_size == 1:
        return None
    barrier()
    pairs: list[Pair] = []
    start = time.monotonic()
    for peer in range(1, ranks.world_size):
        if ranks.is_first:
            is_late = time.monotonic() - start > BUDGET_SECONDS
            pair = _lead(peer, device, clock, leave_out=is_late)
            if pair is not None:
                pairs.append(pair)
        elif ranks.rank == peer:
            _answer(device, clock)
    barrier()
    slowest = min((pair.bytes_per_second for pair in pairs), default=1e9)
    num_bytes = from_first_rank(max(LEAST_BYTES, min(TRANSFER_BYTES, int(slowest * TRANSFER_SECONDS))) // 8 * 8)
    rates = [_ring(num_bytes // ranks.world_size // 8 * 8 + 8, ranks, device) for _ in range(TRANSFER_COUNT + 1)]
    return from_first_rank(Network(pairs, statistics.median(rates[1:])))


def _lead(peer: int, device: torch.device, clock: Callable[[], float], *, leave_out: bool) -> Pair | None:
    """Rank 0's part: it says how many bytes are sent next, 0 ends the turn."""
    if leave_out:
        _announce(0, peer, device)
        return None
    ping = torch.zeros(1, dtype=torch.float64, device=device)
    trips, offsets = [], []
    for _ in range(PING_COUNT + 1):
        _announce(1, peer, device)
        sent = clock()
        start = time.perf_counter()
        send(ping, peer)
        there = float(receive(ping, peer))
        trips.append(time.perf_counter() - start)
        offsets.append(there - (sent + trips[-1] / 2))
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
    """The other rank's part: 1 asks for its clock, more for as many bytes back."""
    ping = torch.zeros(1, dtype=torch.float64, device=device)
    order = torch.zeros(1, dtype=torch.int64, device=device)
    while num_bytes := int(receive(order, 0)):
        if num_bytes == 1:
            receive(ping, 0)
            ping.fill_(clock())
            send(ping, 0)
        else:
            send(receive(torch.empty(num_bytes, dtype=torch.uint8, device=device), 0), 0)


def _ring(num_bytes: int, ranks: Ranks, device: torch.device) -> float:
    mine = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    barrier()
    start = time.perf_counter()
    int(gather_from_ranks(mine)[0][0])
    return (ranks.world_size - 1) * num_bytes / (time.perf_counter() - start)
