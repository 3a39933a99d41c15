"""The card of a run of the paper: verdict, numbers, differences and the record of the run, as JSON and Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitfleet.launch.reproduce.curves import Curve, expected_curve
from bitfleet.launch.reproduce.papers import Paper
from bitfleet.launch.reproduce.recipe import Change, changes_of_config, changes_of_run
from bitfleet.launch.reproduce.record import Record, read_record
from bitfleet.launch.reproduce.standing import Standing, stand
from bitfleet.launch.reproduce.verdict import Verdict, judge
from bitfleet.trainer.config import TrainConfig, to_dict
from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.strict_json import to_json

JSON, MARKDOWN = "reproduce.json", "reproduce.md"


class Card(NamedTuple):
    """All that is said about a run."""

    paper: Paper
    curve: Curve | None
    record: Record
    standings: tuple[Standing, ...]
    changes: tuple[Change, ...]
    verdict: Verdict


def make_card(run: Path, paper: Paper, recipe: TrainConfig) -> Card:
    """Judge the run in the folder `run`.

    Args:
        run: folder of a run.
        paper: what it is to reproduce.
        recipe: the paper's, against which its configuration is compared.

    Raises:
        ValueError: there is nothing to judge yet, or a file is damaged.
    """
    record = read_record(run)
    config = record.config
    curve = expected_curve(paper.curves)
    standings = tuple(
        stand(curve, each.step / record.steps_per_epoch, config.epochs, each.top1, 100 / config.model.num_classes)
        for each in record.validations
    )
    changes = changes_of_config(recipe, config) + changes_of_run(
        paper,
        steps_per_epoch=record.steps_per_epoch,
        global_batch_size=config.global_batch_size,
        batch_size=recipe.global_batch_size,
        num_replicas=record.facts["num_replicas"],
        num_validation_images=record.validations[-1].num_images if record.validations else None,
    )
    verdict = judge(paper, record.validations, record.num_steps, changes, standings[-1] if standings else None)
    return Card(paper, curve, record, standings, tuple(changes), verdict)


def write_card(card: Card, markdown: str) -> tuple[Path, Path]:
    """Write reproduce.json and reproduce.md into the run's folder; returns both paths."""
    paths = card.record.path / JSON, card.record.path / MARKDOWN
    for path, text in zip(paths, (to_json(as_json(card), indent=2) + "\n", markdown), strict=True):
        write_atomically(path, text)
    return paths


def as_json(card: Card) -> dict[str, Any]:
    """The card as JSON types; accuracies in percent."""
    paper, record, last = card.paper, card.record, card.record.validations[-1:]
    return {
        "verdict": card.verdict.kind,
        "sentence": card.verdict.sentence,
        "target": {
            "name": paper.name,
            "title": paper.title,
            "top1": paper.top1,
            "top5": paper.top5,
            "tolerance": paper.tolerance,
            "dry_run": paper.is_dry,
        },
        "top1": last[0].top1 if last else None,
        "top5": last[0].top5 if last else None,
        "best_top1": max((each.top1 for each in record.validations), default=None),
        "changes": [{"name": c.name, "paper": c.paper, "here": c.here} for c in card.changes],
        "differences": list(paper.differences),
        "neighbours": [each._asdict() for each in paper.neighbours],
        "held_against": card.curve.name if card.curve else None,
        "standings": [{**each._asdict(), "difference": each.difference} for each in card.standings],
        "curve": own_curve(record, card.standings),
        "run": {
            **record.facts,
            "seed": record.config.seed,
            "step": record.step,
            "num_steps": record.num_steps,
            "steps_per_epoch": record.steps_per_epoch,
            "skipped_steps": record.num_skipped_steps,
            "hours": record.hours,
            "data_sha256": record.data_sha,
            "checkpoint_step": record.checkpoint_step,
            "weights_sha256": record.weights_sha,
        },
        "network": {
            "num_parameters": record.size.num_parameters,
            "num_binary_parameters": record.size.num_binary_parameters,
            "num_bytes": record.num_bytes,
            "num_macs_1bit": record.size.num_macs_1bit,
            "num_macs_32bit": record.size.num_macs_32bit,
        },
        "config": to_dict(record.config),
    }


def own_curve(record: Record, standings: Sequence[Standing]) -> dict[str, Any]:
    """The run's curve as expected/*.json has them; the tolerances are for the one who ships it to fill in."""
    return {
        "name": f"bitfleet {record.config.name}, seed {record.config.seed}",
        "recipe": f"bitfleet at {record.facts['git']}",
        "comparable": "",
        "source": f"weights sha256 {record.weights_sha}",
        "epochs": record.config.epochs,
        "points": [[each.epochs_done, round(each.top1, 3), None] for each in standings],
    }
