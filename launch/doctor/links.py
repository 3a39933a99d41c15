"""The doctor's verdicts on what is between the ranks: clocks, latency, bandwidth."""

import statistics
from collections.abc import Sequence

from bitfleet.launch.doctor.facts import Facts
from bitfleet.launch.doctor.network import Network
from bitfleet.launch.doctor.table import Check, who

CLOCK_SECONDS = 1.0
LATENCY_SECONDS = 0.005
SLOW_BYTES_PER_SECOND = 100e6
"""Below 1 Gbit/s."""
SLOWER_THAN_MEDIAN = 0.5


def check_clocks(facts: Sequence[Facts], network: Network) -> Check:
    """The clocks of the hosts."""
    offsets = {0: 0.0} | {pair.rank: pair.clock_seconds for pair in network.pairs}
    first, last = min(offsets, key=offsets.__getitem__), max(offsets, key=offsets.__getitem__)
    missing = len(facts) - len(offsets)
    left_out = f" ({missing} ranks were left out, the time was over)" if missing else ""
    apart = offsets[last] - offsets[first]
    value = f"{milliseconds(apart)} apart at most{left_out}"
    if apart > CLOCK_SECONDS:
        advice = f"{who([facts[last]])} is ahead of {who([facts[first]])}: run chrony or ntpd on every host"
        return Check("clocks", value, "WARN", advice)
    return Check("clocks", value)


def check_latency(facts: Sequence[Facts], network: Network) -> Check:
    """Half a round trip of 8 bytes between rank 0 and the others."""
    slowest = max(network.pairs, key=lambda pair: pair.latency_seconds)
    value = (
        f"median {milliseconds(statistics.median(pair.latency_seconds for pair in network.pairs))}, most "
        f"{milliseconds(slowest.latency_seconds)}: {_pair(facts, slowest.rank)}"
    )
    if slowest.latency_seconds > LATENCY_SECONDS:
        return Check("latency", value, "WARN", "a slow network or a busy host: compare with ping")
    return Check("latency", value)


def check_bandwidth(facts: Sequence[Facts], network: Network) -> Check:
    """Bytes a second between rank 0 and the others, and in an all-gather over all."""
    slowest = min(network.pairs, key=lambda pair: pair.bytes_per_second)
    median = statistics.median(pair.bytes_per_second for pair in network.pairs)
    value = (
        f"median {rate(median)}, least {rate(slowest.bytes_per_second)}: {_pair(facts, slowest.rank)}; "
        f"a rank in an all-gather {rate(network.ring_bytes_per_second)}"
    )
    if slowest.bytes_per_second < SLOW_BYTES_PER_SECOND:
        advice = "less than 1 Gbit/s: is it the right interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)?"
        return Check("bandwidth", value, "WARN", advice)
    if slowest.bytes_per_second < SLOWER_THAN_MEDIAN * median and facts[0].host != facts[slowest.rank].host:
        return Check("bandwidth", value, "WARN", "this link is slower than the others, and sets the pace of all")
    return Check("bandwidth", value)


def _pair(facts: Sequence[Facts], rank: int) -> str:
    return f"{who([facts[0]])} and {who([facts[rank]])}"


def milliseconds(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms"


def rate(bytes_per_second: float) -> str:
    """Bytes a second in words."""
    return f"{bytes_per_second / 1e6:,.0f} MB/s"
