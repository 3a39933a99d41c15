import csv
import dataclasses
import json
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bitfleet.configs.sweeps.cifar_settings import SETTINGS
from bitfleet.configs.sweeps.entry import FREE, MIN_SEEDS, TARGET, entry
from bitfleet.configs.sweeps.sweep import plan_runs
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.sweep.table import Outcome, flatten, write_question, write_table
from bitfleet.launch.track.check import Entry, ranking, read_entries
from bitfleet.launch.track.command import track
from bitfleet.trainer.config import to_dict

Record = Callable[..., Path]
DOCS = Path(__file__).parents[4] / "docs"


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Write the files of an entry as a sweep does, with curves of our own."""

    def write(
        name: str = "track_bop2ndorder",
        reached: Sequence[int] = range(4000, 4000 + 1000 * MIN_SEEDS, 1000),
        options: Sequence[str] = (),
        best: float = TARGET,
        status: str = "finished",
        data_sha: str = "a1",
    ) -> Path:
        sweep = entry(name, "a rule", epochs=19, words=SETTINGS["bop2ndorder"]["gamma from 3e-3"])
        runs = plan_runs(sweep, tmp_path / name, options, lambda words: parse_train(words, "t"))
        runs = [run for run in runs if run.config.seed < len(reached)]
        folder = tmp_path / name
        folder.mkdir()
        for run, steps in zip(runs, reached, strict=True):
            run.path.mkdir(parents=True)
            facts = {"config": to_dict(run.config), "num_replicas": 1, "data_sha": data_sha}
            (run.path / "config.json").write_text(json.dumps(facts))
            lines = [
                {
                    "kind": "validation",
                    "step": step,
                    "top1": best if step >= steps else best - 0.2,
                    "top5": 1,
                    "loss": 1 + run.config.seed / 100,
                }
                for step in range(1000, 20_000, 1000)
            ]
            (run.path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        outcomes: Any = {run.name: Outcome(status) for run in runs}  # type: ignore[arg-type]
        write_question(folder, sweep, options, runs)
        write_table(folder, sweep, runs, outcomes)
        return folder

    return write


def read_entry(*folders: Path) -> Entry:
    (entry,) = read_entries(folders)
    return entry


def test_steps_are_those_of_the_first_validation_at_the_target(record: Record) -> None:
    entry = read_entry(record())
    assert entry.steps == tuple(range(4000, 14_000, 1000))
    assert entry.faults == ()
    # t(0.975, 9) = 2.262; sd of 4000 ... 13000 is 3027.65: 2.262 * 3027.65 / sqrt(10) = 2166
    row = ranking([entry]).splitlines()[1]
    assert "8,500" in row
    assert "6,334 to 10,666" in row


def test_a_run_that_never_gets_there_is_a_fault(record: Record) -> None:
    entry = read_entry(record(best=TARGET - 0.001))
    assert len(entry.faults) == MIN_SEEDS
    assert entry.faults[3] == "seed 3 is at most at 69.90 % and never at 70 %"
    assert "never" in ranking([entry])


def test_few_seeds_are_a_fault(record: Record) -> None:
    (fault,) = read_entry(record(reached=(1000, 2000))).faults
    assert fault == "it has the seeds 0, 1; expected 0 to 9, or all up to more"


def test_seeds_are_not_picked(record: Record) -> None:
    folder = record()
    file = folder / "sweep.csv"
    head, _, *others = file.read_text().splitlines()
    file.write_text("\n".join([head, *others]) + "\n")
    (fault,) = read_entry(folder).faults
    assert "seeds 1, 2, 3, 4, 5, 6, 7, 8, 9;" in fault


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ("--global_batch_size 100", "global_batch_size is 100, and every entry has 50"),
        ("--model.width 64", "model.width is 64, and every entry has 32"),
        ("--data.crop_padding 2", "data.crop_padding is 2, and every entry has 4"),
        ("--data.label_smoothing 0.1", "data.label_smoothing is 0.1, and every entry has 0.0"),
    ],
)
def test_what_the_rules_fix_is_compared(option: str, fault: str, record: Record) -> None:
    assert read_entry(record(options=option.split())).faults == (fault,)


def edit(folder: Path, cells: dict[str, str], seeds: Sequence[int] = range(MIN_SEEDS)) -> None:
    """Change cells in the row of seed 3, and keep the rows of `seeds`; three fields have columns of
    their own."""
    with (folder / "sweep.csv").open(newline="") as file:
        rows = [{**row, "config.global_batch_size": "50", "config.model.width": "32"} for row in csv.DictReader(file)]
    rows = [{**row, "config.optim.gamma.start": "3e-3"} for row in rows]
    rows[3] |= cells
    with (folder / "sweep.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[3])
        table.writeheader()
        table.writerows(rows[seed] for seed in seeds)


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        ({"config.global_batch_size": "5000"}, "global_batch_size is 5000, and every entry has 50"),
        ({"config.model.width": "512"}, "model.width is 512, and every entry has 32"),
        ({"curve.step": "", "curve.top1": "", "curve.loss": ""}, "seed 3 has no curve of top-1"),
        ({"end.top1": "nan"}, "the last top-1 of seed 3 is not a number"),
        ({"end.top1": "0.75"}, "the curve of seed 3 ends at 0.7, and its last top-1 is 0.75"),
        ({"config.seed": "13"}, "the row of seed 3 is that of a run with seed 13"),
        (
            {"config.optim.gamma.start": "1e-2"},
            "optim.gamma.start is 3e-3 and 1e-2: all runs of an entry have one setting",
        ),
        (
            {"run.num_replicas": "2"},
            "seed 3 ran with 2 replicas, each with its own BatchNorm statistics, and every entry has 1",
        ),
        ({"run.data_sha": "b2"}, "seed 3 had another list of images than seed 0"),
        (
            {"curve.step": "[1000, 2000]", "curve.top1": "[0.5, 0.7]", "curve.loss": "[1, 1]"},
            "the curve of seed 3 has 2 validations, the last after step 2,000; expected one after each 1,000 steps, "
            "up to 19,000",
        ),
    ],
)
def test_each_row_is_compared(cells: dict[str, str], fault: str, record: Record) -> None:
    folder = record()
    edit(folder, cells)
    assert read_entry(folder).faults == (fault,)


def test_a_curve_counts_once(record: Record) -> None:
    folder = record()
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    edit(folder, {key: cell for key, cell in rows[2].items() if key.startswith(("curve.", "end."))})
    assert read_entry(folder).faults == ("the seeds 2 and 3 have the same curve",)


def test_validations_are_of_all_images(record: Record) -> None:
    """As they are not if images were set aside."""
    faults = read_entry(record(best=7003 / 9999)).faults
    assert len(faults) == MIN_SEEDS
    assert faults[0] == "seed 0 has a top-1 of 0.50037, which is not a fraction of 10,000 images"


def test_an_epoch_has_all_images(record: Record) -> None:
    """An epoch of 60,000 has 1,200 steps."""
    folder = record()
    steps = [1200 * epoch for epoch in range(1, 20)]
    edit(folder, {"curve.step": json.dumps(steps)})
    (fault,) = read_entry(folder).faults
    assert fault.startswith("the curve of seed 3 has 19 validations, the last after step 22,800; expected one after")


def test_entries_with_other_images_are_named(record: Record) -> None:
    folders = [record("track_a"), record("track_b", data_sha="b2"), record("track_c", data_sha="")]
    table = ranking([dataclasses.replace(entry, title=entry.path.name) for entry in read_entries(folders)])
    assert table.endswith("\ntrack_b had another list of images than track_a: their places do not compare")
    assert "track_c had" not in table


@pytest.mark.parametrize("config", [{}, [], {"epochs": None}])
def test_an_entry_without_a_configuration_is_one_sentence(config: object, record: Record) -> None:
    file = record() / "sweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": config}))
    with pytest.raises(ValueError, match="sweep.json .*(epochs None|config must be an object)"):
        read_entry(file.parent)


@pytest.mark.parametrize(
    "option",
    [
        "--engine.precision bf16",
        "--optim.lr.start 1e-3",
        "--data.root /elsewhere",
        "--num_threads 1",
        "--model.compile on",
    ],
)
def test_what_an_entry_may_choose(option: str, record: Record) -> None:
    assert read_entry(record(options=option.split())).faults == ()


def test_free_fields_exist() -> None:
    fields = flatten(to_dict(parse_train(["--config", "cifar_small"], "t")))
    assert all(any(field.startswith(name) for field in fields) for name in FREE)


def test_the_fewest_steps_come_first_and_faults_last(record: Record) -> None:
    slow = read_entry(record("slow", range(8000, 18_000, 1000)))
    fast = read_entry(record("fast", [4000] * 5 + [5000] * 5))
    broken = read_entry(record("broken", [1000] * 3))
    _, first, second, last, fault = ranking([slow, broken, fast]).splitlines()
    assert [line.split()[0] for line in (first, second, last)] == ["1", "2", "-"]
    assert "4,500" in first
    assert "1e-05" in second  # t = 8000 / 972, 9.5 degrees of freedom
    assert fault.startswith(str(broken.path))


def test_of_equal_steps_the_higher_top1_comes_first(record: Record) -> None:
    low, high = (read_entry(record(name, [4000] * 10, best=best)) for name, best in (("low", 0.71), ("high", 0.72)))
    _, first, second = ranking([low, high]).splitlines()
    assert first.split()[-3:] == ["72.00", "±", "0.00"]
    assert second.split()[-3:] == ["71.00", "±", "0.00"]


def test_precise_bn_is_named(record: Record) -> None:
    own = read_entry(record("own", [4000] * 10))
    precise = read_entry(record("precise", [4000] * 10, options=["--precise_bn_steps", "50"]))
    assert precise.faults == ()
    _, _, _, remark = ranking([own, precise]).splitlines()
    assert remark == "a rule was validated with the BatchNorm statistics of its last 50 steps"


def test_seeds_of_an_entry_may_be_in_several_folders(record: Record, tmp_path: Path) -> None:
    whole = read_entry(record())
    parts = []
    for number, seeds in enumerate((range(4), range(4, MIN_SEEDS))):
        parts.append(shutil.copytree(whole.path, tmp_path / f"{number}"))
        edit(parts[-1], {}, seeds)
    assert read_entry(*parts[::-1]) == dataclasses.replace(
        whole, path=parts[1], steps=(*whole.steps[4:], *whole.steps[:4])
    )
    one, twice = read_entries([parts[0], parts[0]])
    assert one.faults == twice.faults == ("it has the seeds 0, 1, 2, 3; expected 0 to 9, or all up to more",)


def test_the_command_fails_on_a_fault(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    track([str(record())])
    with pytest.raises(SystemExit) as ended:
        track([str(record("few", [1000] * 2))])
    assert ended.value.code == 1
    assert "expected 0 to 9" in capsys.readouterr().out


def test_a_sweep_of_many_points_is_no_entry() -> None:
    with pytest.raises(ValueError, match="holds 5 points: expected the sweep.csv and sweep.json of one entry"):
        read_entry(DOCS / "results/regime")


def test_what_holds_no_sweep_is_no_entry(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=f"no sweep.csv in {path}: expected the folder of an entry"):
            read_entry(path)


def test_without_a_path_there_is_nothing_to_check() -> None:
    with pytest.raises(ValueError, match="which entries"):
        track([])


def test_recorded_entries_keep_the_rules_and_are_the_table_of_the_page() -> None:
    page = DOCS / "track.md"
    entries = read_entries(sorted((DOCS / "track").iterdir()))
    assert entries
    assert not any(entry.faults for entry in entries)
    assert textwrap.indent(ranking(entries), "    ") in page.read_text()
