"""Resume on any number of ranks that divides the replicas: the bits of an uninterrupted run."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bitfleet.launch.journal.reader import read_parts, weights_after
from bitfleet.launch.journal.tools import verified
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import checkpoints, read_meta
from tests.conftest import run_bitfleet, run_python, run_ranks
from tests.integration.runs import NUM_STEPS, TRAIN, assert_same_bits, failed, final_tensors, metrics, scalar_steps

KINDS = ("train", "validation")


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    further = "--num_replicas 4 --num_threads 1 --metrics.diagnostics True --resume auto --journal.enabled True"
    return [*tiny, *further.split(), *"--model.initial_weights real --precise_bn_steps None".split()]


@pytest.fixture(scope="module")
def straight(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 30 steps, four replicas on two ranks."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = run_ranks(2, TRAIN, *options, "--run_dir", run, "--stop_after_steps", str(NUM_STEPS))
    assert done.returncode == 0, done.stdout
    return run


def assert_same_run(a: Path, b: Path) -> None:
    """Compare weights, buffers, moments, counts, history of flips, and logs."""
    assert_same_bits(final_tensors(a), final_tensors(b))
    for key in ("optimizer_steps", "schedules", "skipped_steps", "sample_offset", "meter"):
        assert read_meta(checkpoints(a)[-1])[key] == read_meta(checkpoints(b)[-1])[key], key
    assert metrics(a) == metrics(b)
    assert scalar_steps(b, "train/loss") == [5, 10, 15, 20, 25, 30]
    assert scalar_steps(b, "validation/top1") == [12, 24]


@pytest.mark.parametrize(
    ("first", "second", "stop"),
    [
        (2, 2, 24),
        (2, 1, 17),
        pytest.param(1, 4, 17, marks=pytest.mark.slow),
        pytest.param(4, 2, 17, marks=pytest.mark.slow),
    ],
)
def test_resume_on_other_ranks_ends_with_the_same_bits(
    first: int, second: int, stop: int, straight: Path, options: list[str], tmp_path: Path
) -> None:
    """Stop in mid-epoch, and where a validation is due."""
    for num_ranks, last in ((first, stop), (second, NUM_STEPS)):
        done = run_ranks(num_ranks, TRAIN, *options, "--run_dir", tmp_path / "run", "--stop_after_steps", str(last))
        assert done.returncode == 0, done.stdout
    assert_same_run(straight, tmp_path / "run")
    state = final_tensors(straight)
    assert any(name.startswith("optim.exp_avg_sq.blocks") for name in state)
    assert any(tensor.any() for name, tensor in state.items() if name.startswith("diagnostics.fours.blocks"))
    assert any(name.endswith("running_var") for name in state)
    assert_same_journal(straight, tmp_path / "run")


def assert_same_journal(a: Path, b: Path) -> None:
    """Compare the binary weights of every step, and verify those of the checkpoints."""
    assert [len(part.files) for part in read_parts(a)] == [2]
    assert len(read_parts(b)) == 2
    for run in (a, b):
        lines = verified(run).splitlines()
        assert len(lines) == len(checkpoints(run)) + 1
        assert all(line.endswith(": the same bits") for line in lines[:-1])
    for step in range(NUM_STEPS + 1):
        assert_same_bits(weights_after(a, step)[0], weights_after(b, step)[0])


def test_precise_statistics_change_validations_alone_on_any_number_of_ranks(
    straight: Path, options: list[str], tmp_path: Path
) -> None:
    """Interrupted where a validation is due; evaluated with and without."""
    run = tmp_path / "run"
    for num_ranks, last in ((1, 24), (2, NUM_STEPS)):
        done = run_ranks(
            num_ranks, TRAIN, *options, "--run_dir", run, "--stop_after_steps", str(last), "--precise_bn_steps", "5"
        )
        assert done.returncode == 0, done.stdout
    assert_same_bits(final_tensors(straight), final_tensors(run))
    losses = {}
    for name, place in (("straight", straight), ("precise", run)):
        lines = {kind: [line["loss"] for line in metrics(place) if line["kind"] == kind] for kind in KINDS}
        losses[name] = lines["validation"]
        assert lines["train"] == [line["loss"] for line in metrics(straight) if line["kind"] == "train"]
    assert len(losses["precise"]) == len(losses["straight"]) == 2
    assert not set(losses["precise"]) & set(losses["straight"])
    at_24 = straight / "checkpoints" / "step-00000024", run / "checkpoints" / "step-00000024"
    for place, steps, loss in (
        (at_24[0], (), losses["straight"][1]),
        (at_24[0], ("--precise_bn_steps", "5"), losses["precise"][1]),
        (at_24[1], (), losses["precise"][1]),
        (at_24[1], ("--precise_bn_steps", "0"), losses["straight"][1]),
    ):
        done = run_bitfleet("evaluate", place, *steps)
        assert f"loss {loss:.4f}" in done.stdout, done.stdout


@pytest.mark.slow
def test_a_branch_that_is_interrupted_at_once_continues_from_where_it_began(tiny: list[str], tmp_path: Path) -> None:
    run, branch = tmp_path / "run", tmp_path / "branch"
    of_run = run / "checkpoints" / "step-00000004"
    for place, resume, last in ((run, "auto", 4), (branch, of_run, 4), (branch, "auto", 6)):
        further = ("--run_dir", place, "--resume", resume, "--stop_after_steps", str(last))
        done = run_python(TRAIN, *tiny, *further)
        assert done.returncode == 0, done.stdout
    own = branch / "checkpoints" / of_run.name
    assert f"run {branch} continues {own}" in done.stdout
    assert_same_bits(*(checkpoint_tensors.read(path, "") for path in (of_run, own)))
    assert [line["step"] for line in metrics(branch)] == [5]


def test_second_run_in_a_folder_is_refused(options: list[str], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 77 on elsewhere\n")
        lock.flush()
        done = run_python(TRAIN, *options, "--run_dir", tmp_path / "run")
    failed(done, "in use by process 77 on elsewhere", "--run_dir")


def test_damaged_checkpoint_is_set_aside(straight: Path, options: list[str], tmp_path: Path) -> None:
    """One bit of the newest is wrong: the run continues from the one before it, says so, and
    overwrites nothing."""
    run = shutil.copytree(straight, tmp_path / "run")
    newest = checkpoints(run)[-1]
    assert len(checkpoints(run)) > 1
    file = max(newest.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    done = run_python(TRAIN, *options, "--run_dir", run, "--stop_after_steps", str(NUM_STEPS))
    assert done.returncode == 0, done.stdout
    assert re.search(f"{newest} .*damaged .*{file.name} ", done.stdout)
    assert (run / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert_same_run(straight, run)


@pytest.mark.slow
def test_weights_file_begins_another_run(straight: Path, tiny: list[str], tmp_path: Path) -> None:
    """Run `bitfleet checkpoint` verify, diff, weights, and start a run from these weights."""
    assert "all as they were written (step 30)" in run_bitfleet("checkpoint", "verify", straight).stdout
    older, newest = checkpoints(straight)[-2:]
    done = run_bitfleet("checkpoint", "diff", older, newest)
    assert done.returncode == 1
    assert "bits.blocks.0.conv.weight differs first at element" in done.stdout
    losses = []
    for packed in ([], ["--packed"]):
        file = tmp_path / f"weights{len(packed)}.safetensors"
        assert run_bitfleet("checkpoint", "weights", straight, file, *packed).returncode == 0
        run = tmp_path / f"run{len(packed)}"
        done = run_python(TRAIN, *tiny, "--init", file, "--run_dir", run, "--stop_after_steps", "5")
        assert done.returncode == 0, done.stdout
        losses.append(metrics(run)[0]["loss"])
    random = metrics(straight)[0]["loss"]
    assert losses[0] == losses[1] < 0.8 * random
    assert json.loads((run / "config.json").read_text())["config"]["init"] == str(file)
