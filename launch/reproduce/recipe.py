"""Differences between a run and the paper's recipe."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bitfleet.launch.reproduce.curves import expected_curve
from bitfleet.launch.reproduce.papers import Paper
from bitfleet.trainer.config import TrainConfig, to_dict
from bitfleet.trainer.data import DataConfig
from bitfleet.trainer.run.roles import fields_with_role

TOP = ("epochs", "global_batch_size", "init", "init_scales", "precise_bn_steps")
ENGINE = ("precision", "grad_comm_dtype", "max_grad_norm", "deepspeed")
EXACT = ("auto", "fp32", "tf32")
"""Precisions of the recipe: TensorFlow computes fp32 products in TF32 on GPUs that have it."""


class Change(NamedTuple):
    """A setting that differs."""

    name: str
    paper: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.here}, in the recipe {self.paper}"


def changes_of_config(paper: TrainConfig, here: TrainConfig) -> list[Change]:
    """Return the settings of `here` that change the recipe: not seed, ranks or folders."""
    there, ours = recipe(paper), recipe(here)
    changes = [Change(name, there.get(name), ours.get(name)) for name in {**there, **ours}]
    return [change for change in changes if change.paper != change.here]


def changes_of_run(paper: Paper, run: Mapping[str, int], num_images: int | None, same_batch: bool) -> list[Change]:
    """Return what shows, beyond the settings, that data or replicas were not the paper's.

    `num_images` are those of the last validation; steps are compared only with the `same_batch`.
    """
    facts = [("num_replicas (BatchNorm sees a batch's share)", paper.num_replicas, run["num_replicas"])]
    if same_batch:
        facts.append(("training steps per epoch", paper.steps_per_epoch, run["steps_per_epoch"]))
    if num_images is not None:
        facts.append(("validation images", paper.num_validation_images, num_images))
    return [Change(name, there, here) for name, there, here in facts if there not in (None, here)]


def announcement(paper: Paper, recipe: TrainConfig, config: TrainConfig) -> str:
    """Return the goal, the curve that validations are compared with, and the changed settings."""
    curve, changes = expected_curve(paper.config), changes_of_config(recipe, config)
    lines = [f"{paper.title}, published {paper.top1} % top-1, tolerance {paper.tolerance} points"]
    if paper.dry_run:
        lines = [f"dry run of {paper.title}, with a miniature network on the embedded images"]
    measure = f"{curve.name} ({curve.epochs} epochs; {curve.recipe})" if curve else "nothing: no curve is known"
    lines += [f"validations are compared with {measure}", *(f"CHANGED {change}" for change in changes)]
    if changes and not paper.dry_run:
        lines.append('with a changed recipe the verdict will be "not a reproduction"')
    return "\n".join(f"reproduce: {line}" for line in lines)


def recipe(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of `config` that make the recipe: dotted name -> value."""
    resolved = to_dict(config)
    # Missing images show in the counts.
    same = fields_with_role(DataConfig, "host", "machine", "execution")
    data = {key: value for key, value in resolved["data"].items() if key not in same}
    engine = {key: resolved["engine"][key] for key in ENGINE}
    if engine["precision"] in EXACT:
        engine["precision"] = "fp32 or tf32"
    top = {key: resolved[key] for key in TOP}
    distill = {key: value for key, value in resolved["distill"].items() if key != "cache"}
    parts = {"model": resolved["model"], "data": data, "optim": resolved["optim"], "distill": distill}
    return dict(flatten({**top, **parts, "engine": engine}))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
