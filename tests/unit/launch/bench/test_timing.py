"""Rounds and ratios of the benchmarks."""

from bitfleet.launch.bench.timing import interleave, ratio, ratios


def test_contenders_take_turns_in_an_order_that_rotates() -> None:
    calls: list[str] = []

    def contender(name: str) -> int:
        calls.append(name)
        return len(calls)

    results = interleave({name: lambda name=name: contender(name) for name in "abc"}, num_rounds=2)  # type: ignore[misc]
    assert "".join(calls) == "abcbcacab"
    assert results == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}
    assert interleave({"a": lambda: 1}, num_rounds=2, warm_up=0) == {"a": [1, 1]}


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([1.0, 2.0, 40.0], [1.0, 4.0, 10.0]) == [1.0, 0.5, 4.0]
    assert ratio([1.0, 2.0, 40.0], [1.0, 4.0, 10.0]) == 1.0
