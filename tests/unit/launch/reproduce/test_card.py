import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.reproduce.card import (
    DISAGREES,
    MAX_ROWS,
    as_markdown,
    judge,
    make_card,
    weights_sha,
    write_card,
)
from bitfleet.launch.reproduce.curves import Standing
from bitfleet.launch.reproduce.papers import PAPERS, Paper, find_paper
from bitfleet.launch.reproduce.recipe import Change

PAPER = PAPERS["birealnet18"]  # 57.2 %
CHANGE = Change("epochs", 150, 3)


def card_of(*top1: float, paper: Paper = PAPER, **run: Any) -> dict[str, Any]:
    """Return the card of a run of the paper with a validation after each epoch."""
    config = load_config(PAPER.config)
    facts = {
        "world_size": 16,
        "num_replicas": 16,
        "device": "cuda:0",
        "git": "abc",
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "hardware": {"processor": "EPYC", "num_cores": 96, "memory_bytes": 1e12, "gpus": ["H100"] * 2},
        "step": 1251 * len(top1),
        "num_steps": 1251 * 150,
        "steps_per_epoch": 1251,
        "hours": 3.25,
        "skipped_steps": 2,
        "weights_sha256": "e" * 64,
    }
    validations = [
        {"step": 1251 * (i + 1), "top1": value / 100, "top5": 0.79, "num_images": 50_000}
        for i, value in enumerate(top1)
    ]
    return make_card((config, validations, facts | run), paper, config)


def test_markdown_holds_what_a_reader_needs() -> None:
    text = as_markdown(card_of(*[40.0] * 148, 57.5, 57.1))
    assert "**reproduced**: top-1 57.10 %, published 57.2 %: -0.10 points, tolerance 0.5." in text
    assert "| **this run** | 57.10 % | 79.00 % |  |" in text
    assert "| the paper | 57.2 % | not published | -0.10 |" in text
    assert "| larq-zoo, latent weights, 300 epochs | 57.47 % | 79.84 % | -0.37 |" in text
    assert "57.50 % after epoch 149" in text
    for fact in ("hardware.gpus | ['H100', 'H100']", "hours | 3.25", "num replicas | 16", "versions.torch | 2.14.1"):
        assert f"| {fact} |" in text
    assert "| network.num binary parameters | 10,985,472 |" in text
    assert "first 49,152 images" in text
    rows = [line for line in text.splitlines() if line.endswith((" on track |", " off |", " too early |"))]
    assert 20 < len(rows) <= MAX_ROWS
    assert rows[-1].startswith("| 150 | 57.10 | 57.39 +- 3.0 | -0.29 |")


def test_run_without_a_validation_a_known_machine_or_a_curve() -> None:
    card = card_of(hardware=None)
    assert (card["top1"], card["best_top1"]) == (None, None)
    text = as_markdown({**card, "expected_curve": None})
    assert "**unfinished**: no validation yet" in text
    assert "| **this run** | - | - |  |" in text
    assert "| hardware | None |" in text
    assert "No validation curve is known" in text


def test_dry_run_compares_nothing_with_the_paper() -> None:
    text = as_markdown(card_of(40.0, paper=find_paper("birealnet18", dry_run=True)))
    assert "| the paper | 57.2 % | not published | - |" in text
    assert "nothing here can be compared" in text


def test_json_is_complete_and_strict(tmp_path: Path) -> None:
    card = card_of(10.0, 20.0)
    assert write_card(tmp_path, card).read_text() == as_markdown(card)
    (tmp_path / "closed" / "reproduce.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot write the card into .*/closed: "):
        write_card(tmp_path / "closed", card)
    read = json.loads((tmp_path / "reproduce.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert read == json.loads(json.dumps(card))
    assert (read["verdict"], read["top1"], read["best_top1"]) == ("unfinished", 20.0, 20.0)
    assert read["curve"]["points"] == [[1.0, 10.0, None], [2.0, 20.0, None]]
    assert read["config"]["optim"]["gamma"]["start"] == 1e-4
    assert read["run"]["weights_sha256"] == "e" * 64


def test_bytes_of_a_network_are_those_of_larq_zoos_card() -> None:
    assert f"{card_of()['network']['num_bytes'] / 2**20:.2f}" == "4.03"


def verdict(
    top1: float | None, epochs_done: float = 3, changes: Sequence[Change] = (), dry: bool = False
) -> tuple[str, str]:
    """Judge a run of 3 epochs."""
    standing = None if top1 is None else Standing(epochs_done, top1, top1 - 57.0, 57.0, 3.0, "on track")
    return judge(find_paper("birealnet18", dry_run=dry), standing, 3, changes)


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (57.2, "reproduced"),
        (56.7, "reproduced"),
        (57.7, "reproduced"),
        (56.69, "not reproduced"),
        (56.6, "not reproduced"),  # Bop's number must not pass
        (57.71, "higher than published"),
    ],
)
def test_end_within_the_tolerance(last: float, kind: str) -> None:
    found, reason = verdict(last)
    assert found == kind
    assert f"top-1 {last:.2f} %, published 57.2 %: {last - 57.2:+.2f} points, tolerance 0.5" in reason
    assert (found in DISAGREES) == (kind == "not reproduced")


@pytest.mark.parametrize("name", [name for name, paper in PAPERS.items() if paper.neighbours])
def test_numbers_that_the_paper_improves_on_do_not_pass(name: str) -> None:
    bop = PAPERS[name].neighbours[0]
    assert bop["name"].startswith("Bop")
    assert bop["top1"] < PAPERS[name].top1 - PAPERS[name].tolerance


def test_last_validation_counts_and_not_the_best() -> None:
    card = card_of(*[57.2] * 149, 50.0)
    assert (card["verdict"], card["best_top1"]) == ("not reproduced", 57.2)


def test_without_a_validation_at_the_end_there_is_no_verdict() -> None:
    kind, reason = verdict(57.2, epochs_done=2)
    assert (kind, "epoch 2/3" in reason) == ("unfinished", True)
    assert verdict(None)[0] == verdict(57.2, 2, dry=True)[0] == "unfinished"
    assert "unfinished" not in DISAGREES


def test_changed_recipe_is_not_a_reproduction_however_good() -> None:
    kind, reason = verdict(57.2, changes=[CHANGE])
    assert kind == "not a reproduction"
    assert kind in DISAGREES
    assert "+0.00 points; 1 setting changed: epochs is 3, in the recipe 150" in reason
    assert "4 settings changed" in verdict(3.0, changes=[CHANGE] * 4)[1]
    assert "1 setting changed" in verdict(1.0, 1, changes=[CHANGE])[1]


def test_dry_run_says_how_it_stands_and_no_more() -> None:
    kind, reason = verdict(57.0, dry=True, changes=[CHANGE])
    assert kind == "dry run"
    assert "on track" in reason
    assert "57.00 +- 3.0" in reason
    assert kind not in DISAGREES


def test_checksum_of_weights_sees_every_bit_and_no_order() -> None:
    state = {"b": torch.tensor([[1.0, -1.0]]), "a": torch.tensor(3)}
    sha = weights_sha(state)
    assert sha == weights_sha(dict(reversed(state.items())))
    others = [
        {**state, "a": torch.tensor(4)},
        {**state, "a": torch.tensor(3, dtype=torch.int32)},
        {**state, "b": torch.tensor([[1.0], [-1.0]])},
        {"b": state["b"], "c": state["a"]},
    ]
    assert sha not in {weights_sha(other) for other in others}
