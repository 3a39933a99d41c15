"""Counts of what a scan leaves out, and names as text that shows what is in them."""

import os

import pytest

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.left_out import LeftOut, in_words, look_alikes, quoted, shown


@pytest.mark.parametrize(
    ("number", "num_images", "is_fault"), [(1, 99, True), (1, 100, False), (2, 100, True), (1, 0, True)]
)
def test_more_than_one_percent_is_a_fault(number: int, num_images: int, is_fault: bool) -> None:
    omitted = LeftOut()
    omitted.add(left_out.HIDDEN, "train/.1.jpg", number)
    assert bool(omitted.fault(num_images)) == is_fault


def test_a_fault_names_the_first_of_each_reason() -> None:
    omitted = LeftOut()
    omitted.add(left_out.DANGLING, "a/1")
    omitted.add(left_out.DANGLING, "a/2")
    omitted.add_suffix(".gif", "a/e\u0301.gif")
    omitted.add(left_out.TEXT, "a/notes.txt")
    assert omitted.fault(7) == (
        "more than 1% besides the 7 images that are listed: 2 links to nothing, the first: a/1; 1 files named *.gif, "
        "not images that are read, the first: a/e\\u0301.gif"
    )


@pytest.mark.parametrize("reason", [left_out.TEXT, left_out.SYSTEM, left_out.SIDE_IMAGE])
def test_what_is_no_image_is_no_fault(reason: str) -> None:
    omitted = LeftOut()
    omitted.add(reason, "a", 1000)
    assert omitted.fault(1) == ""
    assert in_words({"train": omitted.counts, "val": {}}) == f"train: 1,000 {reason}"


def test_counts_are_added_and_the_first_example_stays() -> None:
    one, other = LeftOut(), LeftOut()
    one.add(left_out.HIDDEN, "one")
    other.add(left_out.HIDDEN, "other", 2)
    other.add(left_out.TEXT, "text")
    other.add(left_out.LOOP, "none", 0)
    one.update(other)
    assert one.counts == {left_out.HIDDEN: 3, left_out.TEXT: 1}
    assert one.examples == {left_out.HIDDEN: "one", left_out.TEXT: "text"}


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
