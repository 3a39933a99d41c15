"""Check what `bitfleet evaluate` prints."""

import dataclasses
from pathlib import Path

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.checkpoint.tools import find
from bitfleet.launch.evaluate import format_evaluation
from bitfleet.trainer.config import to_dict
from bitfleet.trainer.data import DataConfig
from bitfleet.trainer.evaluate import Evaluation, evaluate_run, threads_of_run
from bitfleet.trainer.metrics import Accuracy
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.run.folder import write_config

PLACE = Path("runs/x/checkpoints/step-00000001")
GOOD = Accuracy(loss=1.5, top1=0.572, top5=0.8, num_images=50_000)
OTHER = Accuracy(loss=1.6, top1=0.571, top5=0.8, num_images=50_000)


def lines(found: Evaluation) -> list[str]:
    place, *rest = format_evaluation(found).splitlines()
    assert place == str(PLACE)
    return rest


def test_in_the_precision_of_the_run_there_is_one_line() -> None:
    assert lines(Evaluation(PLACE, "tf32", {"tf32": GOOD}, 0)) == [
        "top-1 57.20%  top-5 80.00%  loss 1.5000  50,000 images"
    ]


def test_another_precision_is_named() -> None:
    assert lines(Evaluation(PLACE, "tf32", {"fp32": GOOD}, 0)) == [
        "trained in tf32",
        "fp32  top-1 57.20%  top-5 80.00%  loss 1.5000  50,000 images",
    ]


def test_several_are_compared() -> None:
    assert lines(Evaluation(PLACE, "bf16", {"fp32": GOOD, "bf16": OTHER}, 1234)) == [
        "trained in bf16",
        "fp32  top-1 57.20%  top-5 80.00%  loss 1.5000  50,000 images",
        "bf16  top-1 57.10%  top-5 80.00%  loss 1.6000  50,000 images",
        "1,234 of 50,000 predictions differ between fp32 and bf16",
    ]
    three = Evaluation(PLACE, "bf16", {"fp32": GOOD, "bf16": OTHER, "fp16": GOOD}, 3)
    assert lines(three)[-1] == "3 of 50,000 predictions differ among fp32, bf16, fp16"


def test_it_computes_with_the_threads_of_the_run() -> None:
    before = torch.get_num_threads()
    with threads_of_run({"num_threads": before + 1}):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_data_that_is_elsewhere_now_can_be_named(tmp_path: Path) -> None:
    config = load_config("fashion_quickstart")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root="no/such/folder"))
    write_config(tmp_path, to_dict(config), {})
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match="no/such/folder' does not exist.*pass it as --data_root"):
        evaluate_run(tmp_path, data_root=None, ranks=Ranks(0, 1, 0, 1), device=torch.device("cpu"))


def test_a_checkpoint_on_another_disk_belongs_to_the_run_that_links_to_it(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk" / "a"
    config = load_config("fashion_quickstart")
    write_config(run, to_dict(dataclasses.replace(config, data=DataConfig(root="no/such/folder"))), {})
    (disk / "step-00000001").mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)
    linked = run / "checkpoints" / "step-00000001"
    assert find(linked) == linked
    with pytest.raises(ValueError, match="no/such/folder' does not exist"):
        evaluate_run(linked, data_root=None, ranks=Ranks(0, 1, 0, 1), device=torch.device("cpu"))
