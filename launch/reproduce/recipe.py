"""What of a run is not as in the paper's recipe."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bitfleet.launch.reproduce.papers import Paper
from bitfleet.trainer.config import TrainConfig, to_dict

TOP = ("epochs", "global_batch_size", "init", "init_scales")
ENGINE = ("precision", "grad_comm_dtype", "max_grad_norm", "deepspeed")
EXACT = ("auto", "fp32", "tf32")
"""Precisions that leave the recipe as it is: TensorFlow computes fp32 products in TF32 on GPUs that have it."""
MACHINE = (
    "root device num_threads loader memory_gib val_batch_size allow_incomplete on_bad_sample max_bad_samples stall_seconds"
).split()
"""Fields of `data` that change no number, or only its last bits; what is left out of the data is counted."""


class Change(NamedTuple):
    """A setting that differs."""

    name: str
    paper: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.here}, in the recipe {self.paper}"


def changes_of_config(paper: TrainConfig, here: TrainConfig) -> list[Change]:
    """Settings of `here` that change the recipe of `paper`. Seed, ranks, folders and what is logged do not."""
    there, ours = recipe(paper), recipe(here)
    return [
        Change(name, there.get(name), ours.get(name)) for name in {**there, **ours} if there.get(name) != ours.get(name)
    ]


def changes_of_run(
    paper: Paper,
    *,
    steps_per_epoch: int,
    global_batch_size: int,
    batch_size: int,
    num_replicas: int,
    num_validation_images: int | None,
) -> list[Change]:
    """What shows, beyond the settings, that data or replicas were not the paper's.

    Args:
        paper: the run of the paper.
        steps_per_epoch: of this run.
        global_batch_size: of this run.
        batch_size: of the paper's; with another one steps are not compared.
        num_replicas: of this run.
        num_validation_images: that its last validation counted; None: there was none.
    """
    found = []
    if global_batch_size == batch_size and steps_per_epoch != paper.steps_per_epoch:
        found.append(Change("training steps an epoch", f"{paper.steps_per_epoch:,}", f"{steps_per_epoch:,}"))
    if num_validation_images not in (None, paper.num_validation_images):
        found.append(Change("validation images", f"{paper.num_validation_images:,}", f"{num_validation_images:,}"))
    if paper.num_replicas not in (None, num_replicas):
        found.append(Change("num_replicas (BatchNorm sees a batch's share)", paper.num_replicas, num_replicas))
    return found


def recipe(config: TrainConfig) -> dict[str, Any]:
    """The fields of `config` that make the recipe: dotted name -> value."""
    resolved = to_dict(config)
    data = {key: value for key, value in resolved["data"].items() if key not in MACHINE}
    engine = {key: resolved["engine"][key] for key in ENGINE}
    if engine["precision"] in EXACT:
        engine["precision"] = "fp32 or tf32"
    top = {key: resolved[key] for key in TOP}
    return dict(_flat({**top, "model": resolved["model"], "data": data, "optim": resolved["optim"], "engine": engine}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return found
