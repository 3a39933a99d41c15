"""A line of the doctor's table, and how facts of many ranks are put into words."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from bitfleet.launch.doctor.facts import Facts

Verdict = Literal["OK", "WARN", "FAIL"]
GB = 1e9


class Check(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    verdict: Verdict = "OK"
    advice: str = ""


def by_value(facts: Sequence[Facts], value: Callable[[Facts], str]) -> str:
    """The value, if it is the same on all ranks; else each with the hosts and ranks that have it."""
    holders: dict[str, list[Facts]] = {}
    for each in facts:
        holders.setdefault(value(each), []).append(each)
    if len(holders) == 1:
        return next(iter(holders))
    return "; ".join(f"{text} on {who(found)}" for text, found in holders.items())


def who(facts: Sequence[Facts]) -> str:
    """Hosts and their ranks in words: "node1 (ranks 0, 1), node2 (rank 2)"."""
    hosts: dict[str, list[int]] = {}
    for each in facts:
        hosts.setdefault(each.host, []).append(each.rank)
    return ", ".join(
        f"{host} (rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))})" for host, ranks in hosts.items()
    )


def spread(facts: Sequence[Facts], value: Callable[[Facts], float], form: Callable[[float], str]) -> str:
    """The value, or the range over the ranks with the rank that has least."""
    values = [value(each) for each in facts]
    low, high = form(min(values)), form(max(values))
    if low == high:
        return low
    return f"{low} to {high}, least on {who([min(facts, key=value)])}"


def differ(facts: Sequence[Facts], value: Callable[[Facts], object]) -> bool:
    """Whether the ranks have different values."""
    return len({value(each) for each in facts}) > 1
