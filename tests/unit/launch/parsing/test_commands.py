"""The options of a command, and what a wrong one is told."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Literal

import pytest
from tyro.conf import Positional

from bitfleet.launch.parsing.commands import Count, MaybeCount, MaybeDecimal, parse, parse_with_run


@dataclasses.dataclass(frozen=True)
class Pack:
    """Pack images."""

    root: Positional[Path]
    """File to read."""
    num_workers: Count = 4
    """Processes."""
    images: MaybeCount = None
    """Images."""
    share: MaybeDecimal = None
    """Size of the memory."""
    shards: bool = False
    """Write shards."""
    on_error: Literal["stop", "skip"] = "stop"
    """Action."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Read images."""

    root: Positional[Path]
    """File to read."""


def test_options_are_fields_and_a_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    words = "pack ~/images --num-workers 2 --images 3 --share=0.5 --shards --on_error skip".split()
    expected = Pack(Path("/home/somebody/images"), 2, 3, 0.5, True, "skip")
    assert parse(Pack | Verify, words, "t") == expected
    assert parse(Pack | Verify, ["verify", "x"], "t") == Verify(Path("x"))
    assert parse(Pack, ["x"], "t") == Pack(Path("x"))


def test_options_of_the_run_are_left() -> None:
    words = "--images 3 --config x --optim.gamma.start 1e-4 --data.mean 1 2 3".split()
    options, rest = parse_with_run(Pack, ["x", *words], "t")
    assert (options.images, rest) == (3, words[2:])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("verfy x", ("'verfy'", "pack, verify")),
        ("pack", ("t pack", "File to read")),
        ("pack x y", ("'y'",)),
        ("pack x --num_worker 3", ("--num_worker;", "--num_workers")),
        ("pack x --num_workers 0", ("--num_workers", "positive number", "'0'")),
        ("pack x --images many", ("--images", "positive number", "'many'")),
        ("pack x --share -1", ("--share", "'-1'")),
        ("pack x --on_error hide", ("--on_error", "'hide'", "'stop', 'skip'")),
        ("", ("pack, verify",)),
    ],
)
def test_a_wrong_word_gets_one_sentence(words: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="t") as caught:
        parse(Pack | Verify, words.split(), "t")
    sentence = str(caught.value)
    assert not [part for part in parts if part not in sentence], sentence
    assert "│" not in sentence
    assert "\n" not in sentence


def test_a_terminal_without_utf8_gets_the_same_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = []
    for encoding in ("utf-8", "ascii"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(ValueError, match="--num_worker;") as caught:
            parse(Pack | Verify, "pack x --num_worker 3".split(), "t")
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


def test_an_option_without_its_command_is_named() -> None:
    with pytest.raises(ValueError, match="no option --images"):
        parse(Pack | Verify, "verify x --images 3".split(), "t")
