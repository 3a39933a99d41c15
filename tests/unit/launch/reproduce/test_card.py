import dataclasses
import json
from pathlib import Path

import torch

from bitfleet.configs import load_config
from bitfleet.launch.reproduce.card import Card, as_json, write_card
from bitfleet.launch.reproduce.curves import expected_curve
from bitfleet.launch.reproduce.markdown import MOST_ROWS, as_markdown
from bitfleet.launch.reproduce.papers import PAPERS, dry_run_of
from bitfleet.launch.reproduce.record import Record, weights_sha
from bitfleet.launch.reproduce.standing import stand
from bitfleet.launch.reproduce.verdict import Validation, judge
from bitfleet.models.size import ModelSize

PAPER = PAPERS["birealnet18"]
LARQ_SIZE = ModelSize(
    num_parameters=11_689_512,
    num_binary_parameters=10_985_472,
    num_running_statistics=9_600,
    num_macs_1bit=1_676_279_808,
    num_macs_32bit=137_793_536,
)


def make_card(path: Path, *top1: float) -> Card:
    """Of a run of the paper with a validation after each epoch."""
    config = load_config(PAPER.config)
    facts = {
        "world_size": 16,
        "num_replicas": 16,
        "device": "cuda:0",
        "git": "abc",
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "hardware": {"processor": "EPYC", "num_cores": 96, "memory_bytes": 1e12, "gpus": ["H100"] * 8},
    }
    record = Record(
        path=path,
        config=config,
        facts=facts,
        validations=tuple(Validation(1251 * (i + 1), value, 79.0, 50_000) for i, value in enumerate(top1)),
        step=1251 * len(top1),
        num_steps=1251 * 150,
        steps_per_epoch=1251,
        hours=3.25,
        num_skipped_steps=2,
        checkpoint_step=1251 * len(top1),
        data_sha="d" * 64,
        weights_sha="e" * 64,
        size=LARQ_SIZE,
    )
    curve = expected_curve(PAPER.curves)
    standings = tuple(stand(curve, i + 1, 150, value, 0.1) for i, value in enumerate(top1))
    verdict = judge(PAPER, record.validations, record.num_steps, (), standings[-1] if standings else None)
    return Card(PAPER, curve, record, standings, (), verdict)


def test_markdown_holds_what_a_reader_needs(tmp_path: Path) -> None:
    text = as_markdown(make_card(tmp_path, *[40.0] * 148, 57.5, 57.1))
    assert "**reproduced**: top-1 57.10 %, published 57.2 %: -0.10 points, tolerance 0.5." in text
    assert "| the paper | 57.2 % | not published | -0.10 |" in text
    assert "| larq-zoo, latent weights, 300 epochs | 57.47 % | 79.84 % | -0.37 |" in text
    assert "Best top-1: 57.50 % after epoch 149; the last one counts." in text
    assert "16 (cuda), 16 replica(s): BatchNorm sees 64 images" in text
    assert "8 x H100; EPYC, 96 cores, 1000 GB" in text
    assert "| hours of training | 3.25 |" in text
    assert "first 49,152 images" in text
    rows = [line for line in text.splitlines() if line.endswith((" on track |", " off |", " too early |"))]
    assert 20 < len(rows) <= MOST_ROWS
    assert rows[-1].startswith("| 150 | 57.10 | 57.39 +- 3.0 | -0.29 |")


def test_run_without_a_validation_or_a_known_machine(tmp_path: Path) -> None:
    card = make_card(tmp_path)
    record = dataclasses.replace(card.record, facts={**card.record.facts, "hardware": None})
    text = as_markdown(card._replace(record=record, curve=None))
    assert "**unfinished**: no validation yet" in text
    assert "| **this run** | - | - |  |" in text
    assert "| machine of rank 0 | not recorded |" in text
    assert "No validation curve is known" in text
    assert as_json(card)["top1"] is None


def test_dry_run_compares_nothing_with_the_paper(tmp_path: Path) -> None:
    text = as_markdown(make_card(tmp_path, 40.0)._replace(paper=dry_run_of(PAPER)))
    assert "| the paper | 57.2 % | not published | - |" in text
    assert "nothing here can be compared with them" in text


def test_json_is_complete_and_strict(tmp_path: Path) -> None:
    card = make_card(tmp_path, 10.0, 20.0)
    path, markdown = write_card(card, "text")
    assert markdown.read_text() == "text"
    read = json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)
    assert read == json.loads(json.dumps(as_json(card)))
    assert (read["verdict"], read["top1"], read["best_top1"]) == ("unfinished", 20.0, 20.0)
    assert read["curve"]["points"] == [[1.0, 10.0, None], [2.0, 20.0, None]]
    assert read["config"]["optim"]["gamma"]["start"] == 1e-4
    assert read["run"]["weights_sha256"] == "e" * 64


def test_bytes_of_a_network_are_those_of_larq_zoos_card(tmp_path: Path) -> None:
    assert f"{make_card(tmp_path).record.num_bytes / 2**20:.2f}" == "4.03"


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
