"""Synthetic sweeps and runs, the same at every call: curves that rise to a known end."""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bitfleet.configs.sweeps.sweep import EACH_AXIS, Figure

CURVES = ("step", "top1", "loss", "train_step", "train_loss", "flip_ratio")
COLUMNS = (
    *"run status seed config.seed best.top1 seconds error steps_per_epoch".split(),
    *(f"end.{key}" for key in "top1 top5 loss train_loss train_top1 flip_ratio images_per_second".split()),
    *(f"curve.{key}" for key in CURVES),
)


def row(
    labels: Mapping[str, object], seed: int, top1: float, *, speed: float = 0.02, number: int = 8
) -> dict[str, str]:
    """A finished run whose validations after 20, 40, ... steps approach `top1` at the rate `speed`
    a step."""
    steps = [20 * (index + 1) for index in range(number)]
    curve = [top1 * (1 - math.exp(-speed * step)) for step in steps[:-1]] + [top1]
    flips = [0.02 * math.exp(-speed * step) + 1e-4 for step in steps]
    losses = [2.3 * (1 - value) for value in curve]
    lists = {
        "step": steps,
        "top1": curve,
        "loss": losses,
        "train_step": steps,
        "train_loss": losses,
        "flip_ratio": flips,
    }
    slug = "_".join(f"{axis}-{value}" for axis, value in labels.items())
    return {
        "run": f"{slug}-seed{seed}",
        "status": "finished",
        "seed": str(seed),
        "config.seed": str(seed),
        **{f"axis.{axis}": str(value) for axis, value in labels.items()},
        "end.top1": repr(top1),
        "end.top5": repr(min(1.0, top1 + 0.1)),
        "end.loss": repr(losses[-1]),
        "end.train_loss": repr(losses[-1]),
        "end.train_top1": repr(top1),
        "end.flip_ratio": repr(flips[-1]),
        "end.images_per_second": "1000.0",
        "best.top1": repr(max(curve)),
        "seconds": "90.0",
        "error": "",
        "steps_per_epoch": "20",
        **{f"curve.{key}": json.dumps(values) for key, values in lists.items()},
    }


def failed(labels: Mapping[str, object], seed: int, error: str) -> dict[str, str]:
    """A run that ended with `error`, or, if that is empty, was not run yet."""
    slug = "_".join(f"{axis}-{value}" for axis, value in labels.items())
    return {
        "run": f"{slug}-seed{seed}",
        "status": "failed" if error else "pending",
        "seed": str(seed),
        "error": error,
        **{f"axis.{axis}": str(value) for axis, value in labels.items()},
    }


def write(
    folder: Path,
    axes: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    /,
    figure: Figure | None = None,
    **facts: object,
) -> Path:
    """Write a sweep folder of `rows`; the values on its axes are declared, and `facts` go into
    sweep.json."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [*COLUMNS[:3], *(f"axis.{axis}" for axis in axes), *COLUMNS[3:]]
    with (folder / "sweep.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    content = {
        "title": "A synthetic sweep",
        "question": "Does it work?",
        "base": "fashion_quickstart",
        "axes": {axis: values_of(rows, axis) for axis in axes},
        "figure": dataclasses.asdict(figure or Figure()),
    }
    (folder / "sweep.json").write_text(json.dumps(content | facts))
    return folder


def values_of(rows: Sequence[Mapping[str, str]], axis: str) -> list[str] | list[float]:
    """Return the values of the rows on an axis: numbers ascending, words in their order."""
    words = list(dict.fromkeys(row[f"axis.{axis}"] for row in rows if row.get(f"axis.{axis}")))
    try:
        return sorted(map(float, words))
    except ValueError:
        return words


def rules(folder: Path, number: int, seeds: int) -> Path:
    """`number` rules with `seeds` seeds: the first is the best, each next one 1.5 points worse and
    slower."""
    rows = [
        row(
            {"rule": f"rule_{index}"},
            seed,
            0.9 - 0.015 * index + 0.004 * (seed - (seeds - 1) / 2),
            speed=0.05 / (1 + index),
        )
        for index in range(number)
        for seed in range(seeds)
    ]
    return write(folder, ["rule"], rows)


def grid(folder: Path, top1: Callable[[int, int], float] | None = None) -> Path:
    """5 x 5 points over gamma and threshold, 3 seeds; one point failed, one has a seed that did not
    run."""
    rows = []
    for i in range(5):
        for j in range(5):
            labels = {"gamma": f"1e-{9 - i}", "threshold": f"1e-{8 - j}"}
            for seed in range(3):
                if (i, j) == (4, 0):
                    rows.append(failed(labels, seed, "the training loss is nan at step 40: lower the learning rate"))
                elif (i, j, seed) == (0, 4, 2):
                    rows.append(failed(labels, seed, ""))
                else:
                    end = top1(i, j) if top1 else 0.88 - 0.012 * abs(i - 2) ** 2 - 0.005 * abs(j - 2)
                    rows.append(row(labels, seed, end + 0.002 * (seed - 1), speed=0.01 * (1 + i)))
    figure = Figure(facets="gamma", grids=(("gamma", "threshold"),), robustness=("gamma", "threshold"))
    return write(folder, ["gamma", "threshold"], rows, figure)


def one_at_a_time(folder: Path) -> Path:
    """Three axes, each swept alone over five decades, and a threshold of 0."""
    rows = []
    for axis, center in (("gamma", -7), ("sigma", -3), ("threshold", -6)):
        for offset in range(-2, 3):
            for seed in range(3):
                value = f"1e{center + offset}"
                rows.append(row({axis: value}, seed, 0.86 - 0.01 * offset**2 + 0.003 * (seed - 1)))
    rows += [row({"threshold": "0"}, seed, 0.855 + 0.001 * seed) for seed in range(3)]
    return write(folder, ["gamma", "sigma", "threshold"], rows, Figure(robustness=("gamma", "sigma", "threshold")))


def star(folder: Path) -> Path:
    """The same three axes, each point with all three values: 13 points around gamma 1e-7, sigma
    1e-3, threshold 1e-6."""
    centre = {"gamma": -7, "sigma": -3, "threshold": -6}
    powers = [centre] + [centre | {axis: centre[axis] + k} for axis in centre for k in (-2, -1, 1, 2)]
    rows = []
    for point in powers:
        away = sum((point[axis] - centre[axis]) ** 2 for axis in centre)
        labels = {axis: f"1e{power:03d}" for axis, power in point.items()}
        rows += [row(labels, seed, 0.86 - 0.01 * away + 0.003 * (seed - 1)) for seed in range(3)]
    middle = {axis: float(f"1e{power}") for axis, power in centre.items()}
    return write(folder, list(centre), rows, Figure(facets=EACH_AXIS, centre=middle, robustness=tuple(centre)))


def run_folder(
    folder: Path,
    num_lines: int = 12,
    *,
    layers: int = 6,
    diagnostics: bool = False,
    seed: int = 0,
    rule: str = "bop2ndorder",
    more: float = 0.0,
) -> Path:
    """A run with a line of training every 10 steps and a validation every 40, which ends at a top-1
    of 0.7 + `more`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(folder, seed, rule)))
    lines: list[dict[str, object]] = []
    for index in range(num_lines):
        step, done = 10 * (index + 1), (index + 1) / num_lines
        flips = {
            f"flip_ratio/blocks.{layer}.conv.weight": 1e-2 * math.exp(-4 * done) / (1 + layer)
            for layer in range(layers)
        }
        values = {
            "loss": 2.3 - 2 * done,
            "top1": 0.1 + 0.7 * done,
            "top5": 0.9,
            "epoch": step / 40,
            "gamma": 3e-4 * (1.1 - done),
        }
        values |= {
            "sigma": 1e-4 * (1 + done),
            "threshold": 1e-8,
            "lr": 2.5e-3,
            "flip_ratio": 1e-2 * math.exp(-4 * done),
            **flips,
        }
        lines.append(
            {
                "kind": "train",
                "step": step,
                **values,
                "images_per_second": 900.0 + index,
                "seconds": 1.0,
                "data_wait_seconds": 0.1,
            }
        )
        if diagnostics:
            lines.append({"kind": "diagnostics", "step": step, **_bits(done, layers)})
        if step % 40 == 0:
            lines.append(
                {
                    "kind": "validation",
                    "step": step,
                    "loss": 2.3 - 1.8 * done,
                    "top1": 0.1 + (0.6 + more) * done,
                    "top5": 0.85,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _config(folder: Path, seed: int, rule: str) -> dict[str, object]:
    optim: dict[str, object] = {"rule": rule, "correction": "none", "weight_decay": 0.0}
    for key, start in (("gamma", 3e-4), ("sigma", 1e-4), ("threshold", 1e-8), ("lr", 2.5e-3)):
        optim[key] = {"start": start, "end": start / 10, "kind": "polynomial", "power": 1.0}
    model = {"name": "birealnet18", "num_classes": 10, "norm": "batch"}
    data = {"root": "fashion-mnist", "image_size": 32, "augmentation": "pad_crop"}
    config = {"name": "synthetic", "epochs": 3, "global_batch_size": 128, "seed": seed, "run_dir": str(folder)}
    content = {"config": {**config, "model": model, "data": data, "optim": optim}, "world_size": 1, "num_replicas": 1}
    return content | {"device": "cpu", "git": "abc", "versions": {"torch": "2"}}


def _bits(done: float, layers: int) -> dict[str, object]:
    values: dict[str, object] = {}
    for layer, name in enumerate(("", *(f"/blocks.{layer}.conv.weight" for layer in range(layers)))):
        part = 1 + 0.05 * layer
        values |= {
            f"flip_ratio{name}": 1e-2 * math.exp(-4 * done) * part,
            f"dead_band{name}": 0.2 * done * part,
            f"never_flipped{name}": math.exp(-3 * done) / part,
            f"oscillators{name}": 0.01 * done * part,
            f"sign_agreement{name}": 0.55 * part,
        }
    edges = [-12 + 0.5 * index for index in range(21)]
    counts = [int(1000 * math.exp(-((edge + 6 + 2 * done) ** 2))) for edge in edges[:-1]]
    return values | {"log_ratio": {"edges": edges, "counts": counts}}
