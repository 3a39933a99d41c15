"""Complete reports of synthetic sweeps and runs, and refused inputs."""

import base64
import dataclasses
import itertools
import json
import math
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from bitfleet.configs import load_config
from bitfleet.configs.sweeps.sweep import TABLE
from bitfleet.launch.report import write_report
from bitfleet.launch.report.drawing import spread_out
from bitfleet.launch.report.published import data_of, is_comparable, networks, published
from bitfleet.launch.report.run_results import answer, read_run, summary
from bitfleet.launch.report.sweep_results import SweepResults
from bitfleet.launch.report.sweep_section import data_of_sweep
from bitfleet.launch.reproduce.papers import PAPERS
from tests.unit.launch.report import synthetic

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Reads a page and checks that its tags close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.text: list[str] = []
        self.widths: list[int] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert not any(str(value).startswith(("http:", "https:", "//")) for value in found.values())
        if tag == "img":
            self.pictures.append(str(found["src"]))
            assert found["alt"]
        if tag == "tr":
            self.widths.append(0)
        if tag in ("td", "th"):
            self.widths[-1] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_a_sweep_becomes_one_page_and_pictures_beside_it(tmp_path: Path) -> None:
    sweep = synthetic.grid(tmp_path / "grid")
    page, (line,) = write_report([sweep])
    assert page == sweep / "report.html"
    assert "Best: gamma 1e-7, threshold 1e-6 with 88.0 ± 0.2 % top-1" in line
    read = Page(page)
    names = sorted(path.name for path in (sweep / "report").iterdir())
    kinds = "convergence curves flips heatmap-flips heatmap robustness top1".split()
    assert names == [f"grid-{kind}.png" for kind in kinds]
    files = {(sweep / "report" / name).read_bytes() for name in names}
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in read.pictures}
    assert embedded == files
    for data in embedded:
        assert min(Image.open(BytesIO(data)).size) > 150
    assert "Does it work?" in read.text
    assert "the training loss is nan at step 40: lower the learning rate" in read.text
    assert "≥ 4.00" in read.text


def test_skipped_steps_and_a_grown_loss_are_told(tmp_path: Path) -> None:
    run = synthetic.run_folder(tmp_path / "run", 10)
    with (run / "metrics.jsonl").open("a") as file:
        for step, loss in ((9000, 1e5), (9010, None), (9020, math.nan)):  # NaN: of an earlier version
            line = {"kind": "train", "step": step, "epoch": step / 10, "loss": loss, "skipped_steps": step - 9000}
            file.write(json.dumps(line) + "\n")
    text = " ".join(answer(read_run(run)))
    assert "20 of 9,020 steps were skipped, because a gradient was not finite." in text
    assert "The training loss grew to 1e+05 at step 9,000" in text
    assert write_report([run], tmp_path / "page")[0].is_file()


@pytest.mark.parametrize(
    ("training", "num_images", "precise_bn_steps", "is_told"),
    [
        (0.8, 10_000, None, True),
        (0.0, 10_000, None, False),  # training fell as well
        (0.8, 50, None, False),  # 30 points of 50 images are within chance
        (0.8, 10_000, 50, False),
    ],
)
def test_a_validation_that_lags_behind_flips_is_told(
    training: float, num_images: int, precise_bn_steps: int | None, is_told: bool, tmp_path: Path
) -> None:
    run = synthetic.run_folder(tmp_path / "run", 10)  # validated with 58 % after step 80
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 110, "loss": 1, "top1": training}) + "\n")
        file.write(json.dumps({"kind": "validation", "step": 120, "top1": 0.28, "num_images": num_images}) + "\n")
    results = read_run(run)
    results.facts["config"]["precise_bn_steps"] = precise_bn_steps
    assert ("Validation fell by 30 points at step 120 while training did not" in " ".join(answer(results))) == is_told


def test_a_run_that_skipped_every_step_has_a_page(tmp_path: Path) -> None:
    run = synthetic.run_folder(tmp_path / "run", 0)
    line = {"kind": "train", "step": 10, "loss": None, "top1": None, "epoch": 0.25, "skipped_steps": 10}
    (run / "metrics.jsonl").write_text(json.dumps(line | {"images_per_second": 0.0, "seconds": 1.0}) + "\n")
    page, (line_of_run,) = write_report([run])
    assert "10 of 10 steps were skipped" in line_of_run
    assert len(Page(page).pictures) == 2  # learning and speed


def test_the_loss_of_a_distilled_run_is_held_against_that_of_guessing(tmp_path: Path) -> None:
    """At temperature 20 the loss is 400 times a cross-entropy from the first step on."""
    run = read_run(synthetic.run_folder(tmp_path / "run"))
    lines = tuple({**line, "loss": 400 * line["loss"]} if line["kind"] == "train" else line for line in run.lines)
    run = dataclasses.replace(run, lines=lines)
    run.facts["config"]["distill"] = {"teacher": "resnet18", "temperature": 20.0, "label_weight": 0.0}
    assert "grew" not in " ".join(answer(run))


def test_the_configuration_of_a_run_in_words(tmp_path: Path) -> None:
    run = read_run(synthetic.run_folder(tmp_path / "run"))
    run.facts["config"]["model"]["norm"] = None  # the network's own
    stairs = {"start": 1e-3, "end": 0.0, "kind": "exponential", "rate": 0.5, "num_steps": None, "share": 0.25}
    run.facts["config"]["optim"] |= {"lr": stairs, "gamma": stairs | {"num_steps": 1000}}
    rows = dict(summary(run))
    assert rows["network"] == "birealnet18, 10 classes"
    assert rows["lr"] == "0.001, times 0.5 every 0.25 of the run"
    assert rows["gamma"] == "0.001, times 0.5 every 1,000 steps"
    linear = {"start": 1e-3, "end": 1e-5, "kind": "polynomial", "power": 1.0}
    run.facts["config"]["optim"] |= {
        "lr": linear | {"kind": "warmup_cosine", "warmup_epochs": 5.0},
        "gamma": linear | {"share": 0.25, "delay_steps": 1000},
        "sigma": linear | {"kind": "stairs", "stairs": 8, "num_steps": 4000, "warmup_steps": 20},
    }
    rows = dict(summary(run))
    assert rows["lr"] == "0.001 → 1e-05, warmup_cosine, warm-up of 5 epochs"
    assert rows["gamma"] == "0.001 → 1e-05, polynomial over 0.25 of the run, after 1,000 steps at 0.001"
    assert rows["sigma"] == "0.001 → 1e-05, stairs in 8 over 4,000 steps, warm-up of 20 steps"


@pytest.mark.parametrize("seeds", [1, 3])
def test_rules_are_drawn_with_any_number_of_seeds(tmp_path: Path, seeds: int) -> None:
    page, _ = write_report([synthetic.rules(tmp_path / "rules", 3, seeds)])
    assert len(Page(page).pictures) == 4


def test_a_run_shows_its_bits_and_its_neighbours(tmp_path: Path) -> None:
    page, (line,) = write_report([synthetic.run_folder(tmp_path / "run", diagnostics=True)])
    read = Page(page)
    assert len(read.pictures) == 6
    assert "Validation after step 120 (epoch 3.0 of 3): top-1 70.0 %, top-5 85.0 %." in line
    text = " ".join(read.text)
    assert "57.47" in text
    assert "must not be compared" in text  # it saw Fashion-MNIST
    assert "3e-04 → 3e-05, polynomial" in text or "0.0003 → 3e-05, polynomial" in text


def test_validation_is_told_at_its_own_step(tmp_path: Path) -> None:
    sentences = answer(read_run(synthetic.run_folder(tmp_path / "run", 10)))
    assert sentences[0].startswith("Validation after step 80 (epoch 2.0 of 3): top-1 58.0 %")
    assert sentences[1] == "Training is at step 100 (epoch 2.5 of 3)."


@pytest.mark.parametrize(
    ("facts", "is_other"),
    [
        ({}, False),
        ({"options": ["--epochs", "3", "--data.root", "/data/cifar10"]}, False),
        ({"options": ["--data.root", "fashion-mnist"]}, True),
        ({"options": ["--data.root=fashion-mnist"]}, True),
        ({"options": ["--model.num_classes", "7"]}, True),
        ({"config": {"data": {"root": "fashion-mnist"}, "model": {"num_classes": 10}}}, True),
        ({"config": {"data": {"root": "data/cifar10"}, "model": {"num_classes": 10}}}, False),
    ],
)
def test_a_sweep_is_compared_only_on_the_published_data(facts: dict[str, object], is_other: bool) -> None:
    results = SweepResults(Path(), "s", "s", "", "binarynet_cifar10", {}, TABLE, (), facts)
    root, num_classes = data_of_sweep(results)
    assert is_comparable("binarynet", num_classes, root) is not is_other


def test_two_steps_are_enough_and_paths_can_be_mixed(tmp_path: Path) -> None:
    run, sweep = synthetic.run_folder(tmp_path / "run", 2), synthetic.rules(tmp_path / "rules", 2, 2)
    page, lines = write_report([run, sweep / "sweep.csv"], tmp_path / "both")
    assert page == tmp_path / "both" / "report.html"
    assert "No validation yet" in lines[0]
    assert len(Page(page).pictures) == 4 + 4
    with pytest.raises(ValueError, match="2 paths .*--output"):
        write_report([run, sweep])


def test_what_is_no_sweep_and_no_run_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone"):
        write_report([tmp_path / "gone"])
    with pytest.raises(ValueError, match="sweep.csv.*config.json"):
        write_report([tmp_path])
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other.csv .*'run'"):
        write_report([other])
    other.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="other.csv"):
        write_report([other])
    with pytest.raises(ValueError, match="empty/sweep.csv"):
        write_report([synthetic.write(tmp_path / "empty", ["rule"], [])])
    failed = synthetic.write(tmp_path / "failed", ["rule"], [synthetic.failed({"rule": "a"}, 0, "no memory")])
    with pytest.raises(ValueError, match=r"1 of 1.*no memory"):
        write_report([failed])
    twice = synthetic.write(
        tmp_path / "twice", ["rule"], [synthetic.row({"rule": "a"}, seed, 0.5) for seed in (0, 1, 0)]
    )
    with pytest.raises(ValueError, match=r"twice/sweep.csv has two rows of the run 'rule-a-seed0'"):
        write_report([twice])
    with pytest.raises(ValueError, match=r"run/\.\./run is given twice"):
        run = synthetic.run_folder(tmp_path / "run")
        write_report([run, run / ".." / "run"], tmp_path / "page")
    (run / "config.json").write_text('{"config": {"model": null}}')
    with pytest.raises(ValueError, match=r"run/config.json is damaged: config.model must be an object, not null"):
        write_report([run])
    for lines in ("5\n", '{"step": 1}\n', '{"kind": "train", "step": null}\n'):
        torn = synthetic.run_folder(tmp_path / "torn")
        (torn / "metrics.jsonl").write_text((torn / "metrics.jsonl").read_text() + lines)
        with pytest.raises(ValueError, match=r"torn/metrics.jsonl:16 is damaged: expected .* kind and step"):
            write_report([torn])
    with pytest.raises(ValueError, match="config.optim.gamma.end must be a number"):
        config = json.loads((torn / "config.json").read_text())
        config["config"]["optim"]["gamma"]["end"] = None
        (torn / "config.json").write_text(json.dumps(config))
        write_report([torn])
    with pytest.raises(ValueError, match="silent"):
        write_report([synthetic.run_folder(tmp_path / "silent", 0)])


def test_labels_are_moved_apart_and_no_further() -> None:
    assert spread_out([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread_out([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread_out([0.99, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    crowded = spread_out([0.5] * 30, 0.1)
    assert all(b - a == pytest.approx(0.1) for a, b in itertools.pairwise(crowded))


def test_published_numbers_are_the_same_everywhere() -> None:
    assert set(PAPERS) == set(networks()) - {"reactnet18", "reactnet_a"}  # no curves of them are published
    for name, paper in PAPERS.items():
        rows = [(row.top1, row.top5) for row in published(name) if row.same_network]
        assert {(paper.top1, paper.top5), *((near["top1"], near["top5"]) for near in paper.neighbours)} <= set(rows)
        config = load_config(paper.config)
        assert config.model.name == name
        assert data_of(name) == ("CIFAR-10" if config.model.num_classes == 10 else "ImageNet")


def test_the_papers_numbers_are_there_with_their_source() -> None:
    best = {"birealnet18": 57.2, "xnornet": 46.9, "binarynet": 91.9}
    assert {name: max(row.top1 for row in published(name) if "Bop2ndOrder" in row.method) for name in best} == best
    assert all(row.source and 0 < row.top1 < 100 for name in networks() for row in published(name))
