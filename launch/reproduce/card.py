"""The card of a run of the paper: verdict, numbers and differences, as JSON and as Markdown."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitfleet.launch.reproduce.curves import Standing, expected_curve, stand
from bitfleet.launch.reproduce.papers import Paper
from bitfleet.launch.reproduce.recipe import Change, changes_of_config, changes_of_run, flatten
from bitfleet.launch.text import markdown_table
from bitfleet.models import count, create_model
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import latest_checkpoint, step_of, verify
from bitfleet.trainer.checkpoint.tensors import BITS, MODEL, Tensors
from bitfleet.trainer.config import TrainConfig, read_config, to_dict
from bitfleet.trainer.metrics import JSONL, read_metrics
from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.folder import CONFIG
from bitfleet.trainer.run.strict_json import to_json

DISAGREES = ("not reproduced", "not a reproduction")
"""Verdicts on a finished run that did not do what it should."""
MAX_ROWS = 25
"""Rows of validations in the Markdown; the JSON has all."""


Record = tuple[TrainConfig, list[dict[str, Any]], dict[str, Any]]
"""Configuration, validations, and facts of a run (of its last part, if it was continued)."""


def read_record(run: Path) -> Record:
    """Read the folder of a run; its newest checkpoint is verified.

    Raises:
        ValueError: not a run, nothing logged or saved yet, or the checkpoint is damaged.
    """
    config, lines, checkpoint = read_config(run), read_metrics(run), latest_checkpoint(run)
    trained = [line for line in lines if line["kind"] == "train"]
    if not trained or checkpoint is None:
        missing = f"training step in {JSONL}" if not trained else "complete checkpoint"
        raise ValueError(f"{run} has no {missing} yet, so it cannot be judged: `bitfleet reproduce NAME` continues it")
    meta, steps_per_epoch = verify(checkpoint), round(trained[-1]["step"] / trained[-1]["epoch"])
    state = checkpoint_tensors.model_state(checkpoint_tensors.read(checkpoint, MODEL, BITS), meta["model"])
    facts = json.loads((run / CONFIG).read_text()) | {
        "seed": config.seed,
        "step": trained[-1]["step"],
        "num_steps": config.epochs * steps_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "skipped_steps": meta["skipped_steps"],
        "hours": round(sum(line["seconds"] for line in trained) / 3600, 4),
        "data_sha256": meta["data_sha"],
        "checkpoint_step": step_of(checkpoint),
        "weights_sha256": weights_sha(state),
    }
    del facts["config"]
    return config, [line for line in lines if line["kind"] == "validation"], facts


def weights_sha(state: Tensors) -> str:
    """Return the sha256 over name, type, shape and bytes of each tensor, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def judge(paper: Paper, last: Standing | None, epochs: int, changes: Sequence[Change]) -> tuple[str, str]:
    """Return the verdict on a run and its reason; `last` counts only after all `epochs`."""
    shown = "; ".join(map(str, changes[:3])) + " ..." * (len(changes) > 3)
    changed = f"; {len(changes)} setting{'s' * (len(changes) > 1)} changed: {shown}" if changes else ""
    if last is None or last.epochs_done < epochs:
        reached = f"the last validation is of epoch {last.epochs_done:g}/{epochs}" if last else "no validation yet"
        return "unfinished", f"{reached}: the same command continues the run{changed}"
    if paper.dry_run:
        expected = f", expected {last.expected:.2f} +- {last.tolerance:.1f}" if last.expected is not None else ""
        return "dry run", f"top-1 {last.top1:.2f} %{expected}: {last.word}; it says nothing about the paper{changed}"
    difference = round(last.top1 - paper.top1, 6)
    reason = f"top-1 {last.top1:.2f} %, published {paper.top1:.1f} %: {difference:+.2f} points"
    if changes:
        return "not a reproduction", f"{reason}{changed}"
    reason += f", tolerance {paper.tolerance:g}"
    if abs(difference) <= paper.tolerance:
        return "reproduced", reason
    if difference < 0:
        return "not reproduced", reason
    return "higher than published", f"{reason}: check for differences before trusting this"


def make_card(record: Record, paper: Paper, recipe: TrainConfig) -> dict[str, Any]:
    """Return the card of a run as JSON types, accuracies in percent; `recipe` is the paper's."""
    config, validations, run = record
    curve = expected_curve(paper.config)
    epochs_done = [line["step"] / run["steps_per_epoch"] for line in validations]
    standings = [stand(curve, n, config, 100 * line["top1"]) for n, line in zip(epochs_done, validations, strict=True)]
    last = validations[-1] if validations else None
    same_batch = config.global_batch_size == recipe.global_batch_size
    changes = changes_of_config(recipe, config)
    changes += changes_of_run(paper, run, last["num_images"] if last else None, same_batch)
    verdict, sentence = judge(paper, standings[-1] if standings else None, config.epochs, changes)
    with torch.device("meta"):
        size = count(create_model(config.model), (3, config.data.image_size, config.data.image_size))
    others = size.num_parameters - size.num_binary_parameters + size.num_running_statistics
    num_bytes = -(-size.num_binary_parameters // 8) + 4 * others
    return {
        "verdict": verdict,
        "sentence": sentence,
        "target": {name: getattr(paper, name) for name in ("name", "title", "top1", "top5", "tolerance", "dry_run")},
        "top1": 100 * last["top1"] if last else None,
        "top5": 100 * last["top5"] if last else None,
        "best_top1": max((standing.top1 for standing in standings), default=None),
        "changes": [change._asdict() for change in changes],
        "differences": list(paper.differences),
        "neighbours": list(paper.neighbours),
        "expected_curve": None if curve is None else dataclasses.asdict(curve),
        "standings": [standing._asdict() for standing in standings],
        "curve": {  # as expected/*.json has them; whoever ships it fills in the tolerances
            "name": f"bitfleet {config.name}, seed {config.seed}",
            "recipe": f"bitfleet at {run['git']}",
            "comparable": "",
            "source": f"weights sha256 {run['weights_sha256']}",
            "epochs": config.epochs,
            "points": [[standing.epochs_done, round(standing.top1, 3), None] for standing in standings],
        },
        "run": run,
        "network": {**dataclasses.asdict(size), "num_bytes": num_bytes},
        "config": to_dict(config),
    }


def write_card(folder: Path, card: dict[str, Any]) -> Path:
    """Write reproduce.json and reproduce.md into the folder of the run; return the latter.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        write_atomically(folder / "reproduce.json", to_json(card, indent=2) + "\n")
        write_atomically(folder / "reproduce.md", as_markdown(card))
    except OSError as error:
        raise ValueError(
            f"cannot write the card into {folder}: {error.strerror}; {card['verdict']}: {card['sentence']}"
        ) from error
    return folder / "reproduce.md"


def as_markdown(card: dict[str, Any]) -> str:
    """Return the whole card, for a reader who has seen nothing else of the run."""
    target, is_dry = card["target"], card["target"]["dry_run"]
    parts = [
        f"# {target['title']}{': a dry run' if is_dry else ''}",
        f"**{card['verdict']}**: {card['sentence']}.",
        _numbers(card),
        f"## Settings that are not {'those of the dry run' if is_dry else 'of the paper'}",
        "\n".join(f"- {Change(**change)}" for change in card["changes"]) or "None.",
        "## Differences between any run of bitfleet and the paper's",
        "\n".join(f"- {difference}" for difference in card["differences"]),
        "## Comparison with the expected curve",
        _validations(card),
        "## The run",
        _run(card),
    ]
    return "\n\n".join(parts) + "\n"


def _numbers(card: dict[str, Any]) -> str:
    target, top1 = card["target"], card["top1"]
    can_compare = top1 is not None and not target["dry_run"]
    rows = [["", "top-1", "top-5", "this run above it, points of top-1"]]
    rows.append(["**this run**", *("-" if card[key] is None else f"{card[key]:.2f} %" for key in ("top1", "top5")), ""])
    for published in ({**target, "name": "the paper"}, *card["neighbours"]):
        top5 = "not published" if published["top5"] is None else f"{published['top5']:g} %"
        difference = f"{top1 - published['top1']:+.2f}" if can_compare else "-"
        rows.append([published["name"], f"{published['top1']:g} %", top5, difference])
    text = f"{markdown_table(rows)}\n\n"
    if target["dry_run"]:
        return f"{text}The published numbers are of {target['title']}: nothing here can be compared with them."
    if card["standings"]:
        best = max(card["standings"], key=lambda standing: standing["top1"])
        text += f"Best top-1: {best['top1']:.2f} % after epoch {best['epochs_done']:g}; the last one counts. "
    return f"{text}Tolerance: {target['tolerance']:g} points (docs/reproduce.md says why)."


def _validations(card: dict[str, Any]) -> str:
    curve, standings = card["expected_curve"], card["standings"]
    if curve is None:
        return "No validation curve is known for this run, only its end."
    rows = [["epoch", "top-1, %", "expected", "difference", ""]]
    every = -(-len(standings) // MAX_ROWS) or 1
    for standing in standings[::-1][::every][::-1]:  # evenly spread, with the last one
        expected, difference = "-", "-"
        if standing["expected"] is not None:
            expected = f"{standing['expected']:.2f} +- {standing['tolerance']:.1f}"
            difference = f"{standing['difference']:+.2f}"
        rows.append([f"{standing['epochs_done']:g}", f"{standing['top1']:.2f}", expected, difference, standing["word"]])
    about = f"{curve['name']} ({curve['epochs']} epochs; {curve['recipe']}). {curve['comparable']}"
    return f"{about} Source: {curve['source']}.\n\n{markdown_table(rows)}"


def _run(card: dict[str, Any]) -> str:
    facts = flatten({"data": card["config"]["data"]["root"], **card["run"], "network": card["network"]})
    rows = [[name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value}"] for name, value in facts]
    return markdown_table([["", ""], *rows])
