"""Names as a reader sees them."""

import os

import pytest

from bitfleet.trainer.data.class_names import look_alikes, quoted, shown


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n01440764", "n01440764"),
        ("caf\u00e9", "caf\u00e9"),
        ("猫", "猫"),
        ("cafe\u0301", "cafe\\u0301"),
        ("a\u200bb", "a\\u200bb"),
        ("a\nb", "a\\nb"),
        ("a\u0338", "a\\u0338"),
        (os.fsdecode(b"\xff"), "\\udcff"),
    ],
)
def test_a_name_is_shown_with_all_that_is_in_it(name: str, text: str) -> None:
    assert shown(name) == text
    assert quoted(name) == f"'{text}'"


def test_a_twin_is_escaped() -> None:
    assert quoted("caf\u00e9", ["cafe\u0301"]) == "'caf\\xe9'"
    assert quoted("caf\u00e9", ["caf\u00e9", "cafe"]) == "'caf\u00e9'"


def test_look_alikes() -> None:
    assert look_alikes(["a", "b", "ab"]) == []
    same, case = look_alikes(["Cat", "caf\u00e9", "cafe\u0301", "cat"])
    assert same == "classes whose names look the same: 'caf\\xe9' and 'cafe\\u0301'"
    assert case == "classes whose names differ in upper and lower case alone: 'Cat' and 'cat'"
    (many,) = look_alikes([*"ABCDE", *"abcde"])
    assert many.endswith("'A' and 'a', 'B' and 'b', 'C' and 'c' and 2 more")
