"""Predicted and measured, of a synthetic run with gradients of noise and of one without."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.advise.advice import advise_run
from bitfleet.launch.advise.measured import steps_to_compare
from bitfleet.optim import OptimConfig, bop2ndorder_step_
from bitfleet.optim.transitions import TransitionConfig
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import FOLDER, write_meta
from bitfleet.trainer.config import to_dict
from bitfleet.trainer.ranks.collectives import cpu_group
from bitfleet.trainer.run.folder import write_config

NUM_STEPS = 60
NUMEL = 40_000


def make_run(run: Path, drift: float) -> Path:
    """Write a run whose gradients are noise with a mean of `drift` standard deviations."""
    config = load_config("fashion_quickstart")
    write_config(run, to_dict(config), {})
    generator = torch.Generator().manual_seed(0)
    weight = torch.where(torch.randn(NUMEL, generator=generator) > 0, 1.0, -1.0)
    mean = drift * torch.randn(NUMEL, generator=generator)
    exp_avg, exp_avg_sq = torch.zeros(NUMEL), torch.zeros(NUMEL)
    gamma, sigma, threshold = (getattr(config.optim, name).over(1125) for name in ("gamma", "sigma", "threshold"))
    lines = []
    for step in range(1, NUM_STEPS + 1):
        before = weight.clone()
        grad = 1e-3 * (mean + torch.randn(NUMEL, generator=generator))
        rates = {"gamma": gamma(step - 1), "sigma": sigma(step - 1), "threshold": threshold(step - 1)}
        bop2ndorder_step_(weight, grad, exp_avg, exp_avg_sq, **rates)
        lines.append({"kind": "train", "step": step, "flip_ratio": float((before != weight).float().mean())})
    lines.append({"kind": "diagnostics", "step": NUM_STEPS, "dead_band": 0.4, "sign_agreement": 0.8})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = run / FOLDER / f"step-{NUM_STEPS:08d}"
    folder.mkdir(parents=True)
    tensors = {"bits.w": torch.zeros(NUMEL // 8, dtype=torch.uint8)}
    tensors |= {"optim.exp_avg.w": exp_avg, "optim.exp_avg_sq.w": exp_avg_sq, "optim.exp_avg.fc": torch.ones(3)}
    checkpoint_tensors.write(tensors, folder, cpu_group("save"))
    write_meta(folder, {"step": NUM_STEPS})
    return run


def line_of(text: str, quantity: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(quantity)]
    return " ".join(found.split())


@pytest.mark.usefixtures("process_group")
def test_noise_is_as_predicted(tmp_path: Path) -> None:
    text = advise_run(make_run(tmp_path, 0.0))
    for step, percent in ((1, "50 %, predicted 50 %"), (2, "25 %, predicted 25 %"), (10, "predicted 10 %")):
        line = line_of(text, f"measured: flips at step {step} ")
        assert percent in line
        assert " ok " in line
    assert " ok " in line_of(text, "measured: r, step 60")
    assert " ok " in line_of(text, "measured: |r| <= threshold, step 60")
    assert " 0 % ok " in line_of(text, "measured: m that stands still")
    assert "40 %, predicted" in line_of(text, "measured: dead band, step 60")
    assert " look " in line_of(text, "measured: dead band, step 60")
    assert "80.0%, of noise 5" in line_of(text, "measured: sign agreement, step 60")


@pytest.mark.usefixtures("process_group")
def test_gradients_with_a_mean_flip_less(tmp_path: Path) -> None:
    text = advise_run(make_run(tmp_path, 3.0))
    line = line_of(text, "measured: flips at step 60")
    assert " look " in line
    assert "x the prediction" in line
    assert "gradients have a mean" in line_of(text, "measured: r, step 60")


def logged_run(run: Path, optim: OptimConfig, flips: dict[int, float]) -> Path:
    """Write a run with another rule that logged these flips and nothing else."""
    run.mkdir()
    write_config(run, to_dict(dataclasses.replace(load_config("fashion_quickstart"), optim=optim)), {})
    lines = [{"kind": "train", "step": step, "flip_ratio": ratio} for step, ratio in flips.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text or '{"kind": "train", "step": 10, "loss": 1.0}\n')
    return run


def test_flips_of_every_rule_are_shown(tmp_path: Path) -> None:
    text = advise_run(logged_run(tmp_path / "a", OptimConfig(rule="two_ema"), {1: 0.25, 10: 0.0}), 6000)
    assert " 25 % ok " in line_of(text, "measured: flips at step 1 ")
    assert " 0 % look " in line_of(text, "measured: flips at step 10 ")
    text = advise_run(logged_run(tmp_path / "b", OptimConfig(rule="bnew"), {}), 6000)
    assert " not logged ok " in line_of(text, "measured: flips")
    with pytest.raises(ValueError, match="flip_ratio"):
        advise_run(logged_run(tmp_path / "c", OptimConfig(rule="diode"), {}), 6000)


@pytest.mark.usefixtures("process_group")
def test_checkpoint_of_no_step_has_no_moments(tmp_path: Path) -> None:
    """A run that stopped at a gradient that is not finite in step 1, and continues."""
    run = make_run(tmp_path, 0.0)
    folder = run / FOLDER / f"step-{NUM_STEPS:08d}"
    folder.rename(folder.with_name("step-00000000"))
    assert "not measured look there is no checkpoint" in line_of(advise_run(run), "measured: moments")


def test_driven_run_is_not_compared_with_a_prediction(tmp_path: Path) -> None:
    optim = OptimConfig(transitions=TransitionConfig(drives="gamma"))
    text = advise_run(logged_run(tmp_path / "run", optim, {1: 0.5, 100: 0.004}), 6000)
    assert "50 %, target 0.5 % ok gamma is driven" in line_of(text, "measured: flips at step 1 ")
    assert " 0.4 %, target 0.49 % ok " in line_of(text, "measured: flips at step 100 ")
    assert "gamma is driven  " in text
    assert not any("prediction" in line or "predicted" in line for line in text.splitlines() if "measured" in line)


def test_steps_that_are_compared() -> None:
    flips = dict.fromkeys(range(10, 1105, 10), 0.1) | {1104: 0.0}
    assert steps_to_compare(flips, 1104) == [10, 100, 550, 1000, 1104]
    assert steps_to_compare({5: 0.1, 10: 0.1}, 1104) == [5, 10]


def test_run_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        advise_run(tmp_path)
    write_config(tmp_path, to_dict(load_config("fashion_quickstart")), {})
    with pytest.raises(ValueError, match="flip_ratio"):
        advise_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 25, "flip_ratio": 0.1}\n')
    with pytest.raises(ValueError, match="step 25, but 128 images .* 24 steps.*--images"):
        advise_run(tmp_path, num_images=128)
