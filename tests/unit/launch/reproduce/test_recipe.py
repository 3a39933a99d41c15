import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bitfleet.configs import load_config
from bitfleet.launch.data.imagenet import CIFAR10, ILSVRC2012
from bitfleet.launch.reproduce.papers import PAPERS, find_paper
from bitfleet.launch.reproduce.recipe import Change, changes_of_config, changes_of_run, flatten, recipe
from bitfleet.optim import linear
from bitfleet.trainer.config import TrainConfig, to_dict
from bitfleet.trainer.run.roles import fields_with_role

PAPER = load_config("birealnet18_imagenet")


def with_section(section: str, **fields: Any) -> TrainConfig:
    return dataclasses.replace(PAPER, **{section: dataclasses.replace(getattr(PAPER, section), **fields)})


def test_what_leaves_the_recipe_as_it_is() -> None:
    other = dataclasses.replace(
        with_section("data", root="/elsewhere", loader="torch", num_threads=3, on_bad_sample="replace"),
        name="x",
        seed=7,
        num_replicas=8,
        run_dir=Path("/r"),
        resume="auto",
        stop_after_steps=5,
        device="cpu",
    )
    assert changes_of_config(PAPER, other) == []
    for fields in ({"sharding": "zero1"}, {"precision": "tf32"}, {"precision": "fp32"}, {"deterministic": False}):
        assert changes_of_config(PAPER, with_section("engine", **fields)) == []


@pytest.mark.parametrize(
    ("here", "change"),
    [
        (dataclasses.replace(PAPER, epochs=3), Change("epochs", 150, 3)),
        (dataclasses.replace(PAPER, init=Path("w.npz")), Change("init", None, "w.npz")),
        (dataclasses.replace(PAPER, precise_bn_steps=50), Change("precise_bn_steps", None, 50)),
        (with_section("model", norm="layer"), Change("model.norm", "batch", "layer")),
        (with_section("data", preprocessing="torchvision"), Change("data.preprocessing", "official", "torchvision")),
        (with_section("optim", gamma=linear(1e-3, 1e-9)), Change("optim.gamma.start", 1e-4, 1e-3)),
        (with_section("distill", teacher="resnet34"), Change("distill.teacher", "", "resnet34")),
        (with_section("engine", precision="bf16"), Change("engine.precision", "fp32 or tf32", "bf16")),
    ],
    ids=lambda value: value.name if isinstance(value, Change) else "",
)
def test_what_changes_the_recipe(here: TrainConfig, change: Change) -> None:
    assert changes_of_config(PAPER, here) == [change]


def test_every_field_is_of_the_recipe_or_known_to_change_nothing() -> None:
    fields = {name for name, _ in flatten(to_dict(PAPER))}
    free = fields_with_role(TrainConfig, "host", "machine", "execution", "place", "habit")
    others = {name for name in fields - set(recipe(PAPER)) if name not in free and name.split(".")[0] not in free}
    assert others == {
        "init_head",  # of init
        "num_replicas",  # shows in the run
        "seed",
        *(f"engine.{name}" for name in ("check_every_steps", "collective_timeout_minutes", "cuda_graph")),
        *(f"engine.{name}" for name in ("deterministic", "on_nonfinite", "sharding")),
    }


def test_other_data_and_replicas_show_in_the_run() -> None:
    def changes(name: str, num_images: int | None = 50_000, same_batch: bool = True, **run: int) -> list[str]:
        paper = PAPERS[name]
        facts = {"steps_per_epoch": paper.steps_per_epoch, "num_replicas": 1} | run
        return [change.name for change in changes_of_run(paper, facts, num_images, same_batch)]

    assert changes("birealnet18") == []
    assert changes("birealnet18", None, num_replicas=8) == []
    assert changes("birealnet18", steps_per_epoch=100) == ["training steps per epoch"]
    assert changes("birealnet18", steps_per_epoch=100, same_batch=False) == []  # the batch is named
    assert changes("birealnet18", 49_999) == ["validation images"]
    assert changes("binarynet", 10_000, num_replicas=2) == ["num_replicas (BatchNorm sees a batch's share)"]


@pytest.mark.parametrize("name", PAPERS)
def test_papers_agree_with_their_configurations(name: str) -> None:
    config, paper = load_config(PAPERS[name].config), PAPERS[name]
    data = CIFAR10 if config.model.num_classes == 10 else ILSVRC2012
    assert paper.steps_per_epoch == data.train // config.global_batch_size
    assert paper.num_validation_images == data.val
    dry = find_paper(name, dry_run=True)
    assert dry.steps_per_epoch == 6000 // load_config(dry.config).global_batch_size


def test_unknown_paper_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="birealnet18, xnornet, binarynet.*'xnor_net'.*'xnornet'"):
        find_paper("xnor_net")
