"""Train, evaluate and refuse on tiny images: the main job under DeepSpeed's launcher and torchrun,
the others as forks."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch

from bitfleet.launch.advise.advice import advise_run
from bitfleet.models import ModelConfig, create_model
from bitfleet.trainer.checkpoint.format import checkpoints
from bitfleet.trainer.engine.arithmetic import remark_on_precision
from bitfleet.trainer.metrics import read_metrics
from tests.conftest import BIN, Launch, free_port, run_bitfleet, run_command, run_python, run_ranks
from tests.integration.runs import NUM_STEPS, TRAIN, assert_same_bits, failed, final_tensors, final_weights


@pytest.fixture(scope="module")
def tiny(tiny: list[str]) -> list[str]:
    """Options of a run that starts from real weights, as in the paper."""
    return [*tiny, "--model.initial_weights", "real"]


@pytest.fixture(scope="module")
def straight(deepspeed: Launch, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run of 30 steps on two ranks, and its output."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = deepspeed(2, TRAIN, *tiny, "--run_dir", run, "--stop_after_steps", str(NUM_STEPS))
    assert done.returncode == 0, done.stdout
    return run, done.stdout


def test_run_folder_holds_what_the_design_says(straight: tuple[Path, str]) -> None:
    run, output = straight
    names = {".lock", "config.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert {path.name for path in run.iterdir()} == names
    resolved = json.loads((run / "config.json").read_text())
    assert resolved["config"]["global_batch_size"] == 16
    assert resolved["world_size"] == 2
    assert len(resolved["data_sha"]) == 64
    assert resolved["versions"]["torch"] == importlib.metadata.version("torch")
    weights = final_weights(run)
    assert set(weights["blocks.0.conv.weight"].unique().tolist()) == {-1.0, 1.0}
    assert re.search(r"blocks\.0\.conv\.weight +16x16x3x3 +binary +bop2ndorder +2,304 +18,432", output)
    assert "The binary weights start as real values; their first update makes them +-1." in output
    assert re.search(r"checkpoints: 0\.6 MB each, at most 4 at a time \(2\.6 MB\); [\d,.]+ GB free in ", output)
    assert re.search(
        r"a stop needs about 1 s between SIGTERM and SIGKILL \(a save takes 0\.0 s, assumed at 50 MB/s\)", output
    )
    assert re.search(
        r"a stop needs about \d+ s between SIGTERM and SIGKILL \(a save takes \d+\.\d s, measured\)", output
    )
    for command in ("tensorboard --logdir", "bitfleet evaluate", "--resume"):
        assert command in output


def test_advice_reads_the_run(straight: tuple[Path, str]) -> None:
    text = advise_run(straight[0])
    assert re.search(r"measured: flips at step 30 .* %, predicted .* %", text)
    assert re.search(r"measured: r, step 30 +\d\.\de-0\d, predicted \d\.\de-0\d", text)


def test_metrics_are_complete(straight: tuple[Path, str]) -> None:
    run, _ = straight
    lines = read_metrics(run)
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [5, 10, 15, 20, 25, 30]
    names = set("loss top1 top5 gamma sigma threshold lr images_per_second data_wait_seconds flip_ratio".split())
    names |= {"slowest_rank", "slowest_host", "slowest_seconds", "median_seconds"}
    assert names <= train[0].keys()
    assert sum(key.startswith("flip_ratio/") for key in train[0]) == 6
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [12, 24]
    assert all(line["num_images"] == 28 for line in lines if line["kind"] == "validation")
    # schedule(k - 1) made update k, and its length is the whole run, not the part until the stop.
    assert train[0]["gamma"] == pytest.approx(3e-4 + (1e-5 - 3e-4) * 4 / 37)


def test_tensorboard_shows_the_run(straight: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = straight
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/top1", "train/flip_ratio", "train/lr", "validation/top1"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15, 20, 25, 30]
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(
    "sharding",
    ["zero1", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("none", "zero2", "zero3"))],
)
def test_deepspeed_stages_train_the_same_bits(
    sharding: str, straight: tuple[Path, str], tiny: list[str], tmp_path: Path
) -> None:
    """Compare DeepSpeed's ZeRO stages 0 to 3, some of them interrupted, with bitfleet's sharding of
    `straight`."""
    run, _ = straight
    options = [*tiny, "--run_dir", tmp_path / "run", "--resume", "auto", "--engine.sharding", sharding]
    for last in (17, NUM_STEPS) if sharding != "none" else (NUM_STEPS,):
        done = run_ranks(2, TRAIN, *options, "--stop_after_steps", str(last))
        assert done.returncode == 0, done.stdout
        resumed = last == NUM_STEPS and sharding != "none"
        assert resumed or "step 1: bop2ndorder updated all" in done.stdout
    assert_same_bits(final_weights(run), final_weights(tmp_path / "run"))
    if sharding == "zero1":  # whose files are DeepSpeed's
        done = run_ranks(1, TRAIN, *options, "--num_replicas", "2")
        failed(done, "world_size is 2", "1")


@pytest.mark.slow
def test_a_rank_without_validation_images_gathers_the_weights_of_zero3(tiny: list[str], tmp_path: Path) -> None:
    """28 images in batches of 100, and layers that DeepSpeed does not keep whole on every rank."""
    options = [*tiny, "--model.width", "64", "--metrics.diagnostics", "False", "--precise_bn_steps", "None"]
    options += ["--run_dir", tmp_path / "run", "--stop_after_steps", "12", "--engine.sharding", "zero3"]
    done = run_ranks(2, TRAIN, *options)
    assert done.returncode == 0, done.stdout
    assert "(28 images)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("network", ["reactnet_small", "quicknet_small"])
def test_other_networks_train_the_same_bits_in_all_shardings(network: str, tiny: list[str], tmp_path: Path) -> None:
    shape = ["--model.depths", "1", "1", "--model.width", "8"]
    options = [*tiny, "--model.name", network, "--model.norm", "None", *shape, "--stop_after_steps", "13"]
    for sharding in ("bits", "zero1", "zero3"):
        run = tmp_path / sharding
        done = run_ranks(2, TRAIN, *options, "--run_dir", run, "--engine.sharding", sharding)
        assert done.returncode == 0, done.stdout
        assert_same_bits(final_weights(tmp_path / "bits", 13), final_weights(run, 13))


@pytest.mark.slow
def test_on_one_rank_all_shardings_are_the_plain_optimizer(tiny: list[str], tmp_path: Path) -> None:
    weights = []
    for sharding in ("bits", "zero1", "none"):
        options = ["--run_dir", tmp_path / sharding, "--engine.sharding", sharding]
        done = run_bitfleet("train", *tiny, *options, "--stop_after_steps", str(NUM_STEPS))
        assert done.returncode == 0, done.stdout
        weights.append(final_weights(tmp_path / sharding))
    assert_same_bits(weights[0], weights[1])
    assert_same_bits(weights[0], weights[2])


def test_torchrun_is_the_same_job(straight: tuple[Path, str], tiny: list[str], tmp_path: Path) -> None:
    run, _ = straight
    launcher = [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), TRAIN]
    done = run_command([*launcher, *tiny, "--run_dir", tmp_path / "run", "--stop_after_steps", str(NUM_STEPS)])
    assert done.returncode == 0, done.stdout
    assert_same_bits(final_tensors(run), final_tensors(tmp_path / "run"))


def test_one_rank_alone_and_other_options(tiny: list[str], tmp_path: Path) -> None:
    """One rank with two replicas, bf16, Bop, and DeepSpeed options from a file."""
    (tmp_path / "deepspeed.json").write_text(
        '{"wall_clock_breakdown": false, "zero_optimization": {"reduce_bucket_size": 50000}}'
    )
    options = (
        f"--run_dir {tmp_path}/run --stop_after_steps 12 --num_replicas 2 --engine.precision bf16 --optim.rule bop "
        f"--optim.gamma.start 1e-4 --optim.gamma.kind constant --engine.deepspeed {tmp_path}/deepspeed.json "
        "--engine.grad_comm_dtype bf16 --engine.max_grad_norm 1.0 --engine.check_every_steps 5 "
        "--checkpoint.every_minutes 1e-6 --checkpoint.keep_last 3"
    )
    done = run_python("-m", "bitfleet.launch.train", *tiny, *options.split())
    assert done.returncode == 0, done.stdout
    *_, train, validation = read_metrics(tmp_path / "run")
    assert (train["gamma"], train["skipped_steps"]) == (1e-4, 0)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{step:08d}" for step in (10, 11, 12)]
    done = run_bitfleet("evaluate", tmp_path / "run")
    assert f"loss {validation['loss']:.4f}" in done.stdout  # in the run's precision
    done = run_bitfleet("evaluate", tmp_path / "run", "--precision", "fp32", "bf16")
    trained, single, half, differ = done.stdout.splitlines()[-4:]
    assert trained == "trained in bf16"
    assert single.startswith("fp32  top-1 ")
    assert half.startswith("bf16  top-1 ")
    assert f"loss {validation['loss']:.4f}" in half
    assert f"loss {validation['loss']:.4f}" not in single
    assert re.fullmatch(r"\d+ of 28 predictions differ between fp32 and bf16", differ)
    assert bool(remark_on_precision("bf16", "cpu")) == ("has no instructions for bf16" in done.stdout)
    done = run_bitfleet("evaluate", tmp_path / "run", "--precision", "tf32")
    failed(done, 'precision "tf32"', "CPU")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_evaluate_counts_every_image_once(num_ranks: int, straight: tuple[Path, str]) -> None:
    """28 images on 3 ranks in batches of 100: one rank has fewer; the output is the validation of
    the run."""
    run, _ = straight
    options = ["--precise_bn_steps", "0", "--precision", "fp32", "fp32"] if num_ranks == 3 else []
    alone = run_bitfleet("evaluate", checkpoints(run)[-1], *options)
    done = alone if num_ranks == 1 else run_ranks(num_ranks, "launch/evaluate.py", run, *options)
    assert done.returncode == 0, done.stdout
    accuracy = [line for line in done.stdout.splitlines() if line.startswith("top-1")]
    assert len(accuracy) == 1, done.stdout
    assert accuracy[0].endswith("28 images")
    assert accuracy[0] in alone.stdout


def test_statistics_of_two_replicas_are_not_measured_on_three_ranks(straight: tuple[Path, str]) -> None:
    failed(run_ranks(3, "launch/evaluate.py", straight[0]), "2 replicas", "not on 3", "--precise_bn_steps 0")


def test_bad_option_ends_the_whole_job_with_one_sentence(deepspeed: Launch, tiny: list[str]) -> None:
    failed(deepspeed(2, TRAIN, *tiny, "--optim.gama.start", "1"), "--optim.gama.start", "--optim.gamma.start")


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_batch(tiny: list[str]) -> None:
    failed(run_ranks(3, TRAIN, *tiny), "global_batch_size is 16", "3 ranks")


def test_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    done = run_python(TRAIN, "--config", "xnornet_imagenet", "--output", tmp_path / "runs")
    failed(done, "data/imagenet")
    assert not (tmp_path / "runs").exists()


def test_broken_image_ends_the_whole_job_and_is_named(tiny_images: Path, tiny: list[str], tmp_path: Path) -> None:
    root = shutil.copytree(tiny_images, tmp_path / "images")
    victim = root / "train" / "class2" / "0007.png"
    victim.write_bytes(victim.read_bytes()[:200])  # the header stays readable
    options = [str(root) if option == str(tiny_images) else option for option in tiny]
    failed(run_ranks(2, TRAIN, *options, "--run_dir", tmp_path / "run"), str(victim))


def test_resume_with_another_optimizer_is_refused(straight: tuple[Path, str], tiny: list[str]) -> None:
    run, _ = straight
    done = run_ranks(2, TRAIN, *tiny, "--optim.correction", "as_coded", "--resume", run)
    failed(done, "optim.correction", "'none'", "'as_coded'")


def test_checkpoint_of_another_model_is_refused(straight: tuple[Path, str], tiny: list[str]) -> None:
    run, _ = straight
    done = run_ranks(2, TRAIN, *tiny, "--model.width", "8", "--resume", run)
    failed(done, "stem.0.weight", "[16, 3, 3, 3]", "[8, 3, 3, 3]")


@pytest.mark.parametrize(
    "rule", ["bop2ndorder", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("bop", "latent_sgd"))]
)
def test_a_run_from_the_weights_of_another_keeps_them(
    rule: str, straight: tuple[Path, str], tiny: list[str], tmp_path: Path
) -> None:
    """Pass the folder of a run to --init; one rank and two do the same."""
    before = final_weights(straight[0])
    options = [*tiny, "--init", straight[0], "--optim.rule", rule, "--num_replicas", "2", "--num_threads", "1"]
    runs = [tmp_path / str(num_ranks) for num_ranks in (1, 2)]
    for num_ranks, run in zip((1, 2), runs, strict=True):
        done = run_ranks(num_ranks, TRAIN, *options, "--run_dir", run, "--stop_after_steps", "1")
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("the state of the optimizer was seeded with the gradients of 8 steps") == 1
    assert_same_bits(final_tensors(runs[0], 1), final_tensors(runs[1], 1))
    after = final_weights(runs[0], 1)
    changed = [(after[name] != before[name]).float().mean() for name in after if name.endswith("conv.weight")]
    assert changed
    assert max(changed) < 0.01


def test_more_epochs_of_a_run_are_refused_with_the_way(
    straight: tuple[Path, str], tiny: list[str], tmp_path: Path
) -> None:
    shutil.copytree(straight[0], tmp_path / "run")
    options = [*tiny, "--run_dir", tmp_path / "run", "--resume", "auto", "--num_replicas", "2", "--epochs", "9"]
    done = run_bitfleet("train", *options)
    failed(done, "--run_dir", f"--init {tmp_path / 'run'}")


@pytest.fixture(scope="module")
def broken_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for `tiny` with one value that is not a number."""
    state = create_model(ModelConfig(name="birealnet_small", width=16, num_classes=4)).state_dict()
    state["head.bias"][1] = float("nan")
    path = tmp_path_factory.mktemp("broken") / "nan.safetensors"
    safetensors.torch.save_file(state, path)
    return path


def strict_lines(run: Path) -> list[dict[str, object]]:
    """Parse metrics.jsonl as strict JSON."""

    def refuse(token: str) -> None:
        pytest.fail(f"{token} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_skips_every_step_saves_and_stops(tiny: list[str], broken_weights: Path, tmp_path: Path) -> None:
    """On two ranks, after the first report; a checkpoint and valid JSON are left."""
    run = tmp_path / "run"
    done = run_ranks(2, TRAIN, *tiny, "--init", broken_weights, "--run_dir", run)
    failed(done, "head.bias", "saved")
    assert "--engine.on_nonfinite skip" not in done.stdout.split("bitfleet: error")[1]
    assert "5 skipped" in done.stdout
    assert [path.name for path in checkpoints(run)] == ["step-00000005"]
    (line,) = strict_lines(run)
    assert (line["step"], line["loss"], line["top1"], line["skipped_steps"]) == (5, None, None, 5)


@pytest.mark.parametrize(
    "options", ["--stop_after_steps 1", "--stop_after_steps 4", "--epochs 1 --metrics.every_steps 100"]
)
def test_a_short_run_that_skips_every_step_says_so(
    options: str, tiny: list[str], broken_weights: Path, tmp_path: Path
) -> None:
    """Before its first report, or at its end; resumed, it is not called finished."""
    command = ["train", *tiny, "--init", broken_weights, *options.split(), "--run_dir", tmp_path / "run"]
    failed(run_bitfleet(*command), "head.bias")
    assert run_bitfleet(*command, "--resume", "auto").returncode == 2
    failed(run_bitfleet("evaluate", tmp_path / "run"), "head.bias")


def test_weights_that_break_without_a_check_stop_the_run(tiny: list[str], broken_weights: Path, tmp_path: Path) -> None:
    """DeepSpeed's sharding skips no step: the loss shows it, also before the first report."""
    options = f"--engine.sharding none --init {broken_weights} --optim.init_inertia 0 --stop_after_steps 2".split()
    failed(run_bitfleet("train", *tiny, *options, "--run_dir", tmp_path / "run"), "loss", "nan", "step 2")
