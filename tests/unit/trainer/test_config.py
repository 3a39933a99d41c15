import dataclasses
from pathlib import Path

import pytest

from bitfleet.configs import available, load_config
from bitfleet.optim import OptimConfig, Schedule, TransitionConfig
from bitfleet.trainer.config import from_dict, resolve_replicas, to_dict, with_precision
from bitfleet.trainer.distillation import DistillConfig
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.metrics import MetricsConfig


@pytest.mark.parametrize("name", available())
def test_written_configuration_reads_back(name: str) -> None:
    config = dataclasses.replace(load_config(name), run_dir=Path("/runs/x"), num_replicas=4)
    assert from_dict(to_dict(config)) == config


def test_replicas_default_to_the_ranks() -> None:
    config = load_config("fashion_quickstart")
    assert resolve_replicas(config, 2) == 2
    assert resolve_replicas(dataclasses.replace(config, num_replicas=8), 2) == 8


@pytest.mark.parametrize(
    ("fields", "world_size", "message"),
    [
        ({"global_batch_size": 64}, 3, "global_batch_size is 64, which 3 replicas on 3 ranks"),
        ({"num_replicas": 4}, 3, "num_replicas is 4, which 3 ranks"),
        ({"num_replicas": 12}, 4, "global_batch_size is .*, which 12 replicas on 4 ranks"),
    ],
)
def test_world_size_that_does_not_divide_is_refused(fields: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_replicas(dataclasses.replace(load_config("fashion_quickstart"), **fields), world_size)


@pytest.mark.parametrize(
    "name", ["epochs", "global_batch_size", "num_replicas", "validate_every_epochs", "stop_after_steps"]
)
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        dataclasses.replace(load_config("fashion_quickstart"), **{name: 0})


@pytest.mark.parametrize("name", ["", "..", "../../x", "/x", "a/b"])
def test_a_name_is_that_of_one_folder(name: str) -> None:
    with pytest.raises(ValueError, match=f"name must be that of one folder, not '{name}': .*--output"):
        dataclasses.replace(load_config("fashion_quickstart"), name=name)


def test_transitions_need_our_own_sharding() -> None:
    config = load_config("fashion_quickstart")
    optim = OptimConfig(rule="latent_adam", transitions=TransitionConfig(drives="latent_lr"))
    assert from_dict(to_dict(dataclasses.replace(config, optim=optim))).optim == optim
    with pytest.raises(
        ValueError, match=r'optim.transitions needs engine.sharding "bits", which counts .* not \'zero1\''
    ):
        dataclasses.replace(config, optim=optim, engine=dataclasses.replace(config.engine, sharding="zero1"))


def test_a_warm_up_ends_before_the_run() -> None:
    config = load_config("fashion_quickstart")
    warm = Schedule(start=0.1, kind="warmup_cosine", warmup_epochs=5)
    for fields in ({"lr": warm}, {"rule": "latent_adam", "latent_lr": warm}):
        optim = OptimConfig(**fields)  # type: ignore[arg-type]
        assert from_dict(to_dict(dataclasses.replace(config, epochs=6, optim=optim))).optim == optim
        with pytest.raises(ValueError, match=r"lr\.warmup_epochs is 5, and the run has 5 epochs: warm up for less"):
            dataclasses.replace(config, epochs=5, optim=optim)
    target = OptimConfig(transitions=TransitionConfig(drives="gamma", target=warm))
    with pytest.raises(ValueError, match=r"optim\.transitions\.target\.warmup_epochs is 5, and the run has 5 epochs"):
        dataclasses.replace(config, epochs=5, optim=target)


def test_smoothed_labels_need_a_loss_of_labels() -> None:
    config = load_config("fashion_quickstart")
    data = dataclasses.replace(config.data, label_smoothing=0.1)
    teacher = DistillConfig(teacher="resnet34", label_weight=0.5)
    assert dataclasses.replace(config, data=data, distill=teacher).data == data
    with pytest.raises(ValueError, match=r"data\.label_smoothing is 0\.1, but labels are not used: set distill"):
        dataclasses.replace(config, data=data, distill=DistillConfig(teacher="resnet34"))


def test_diagnostics_want_sharded_bits() -> None:
    with pytest.raises(
        ValueError, match="metrics.diagnostics are counted in the step of engine.sharding bits.*'zero1'"
    ):
        dataclasses.replace(
            load_config("fashion_quickstart"),
            engine=EngineConfig(sharding="zero1"),
            metrics=MetricsConfig(diagnostics=True),
        )


def test_precision_is_that_of_the_device_or_of_the_run_that_is_continued() -> None:
    config = load_config("fashion_quickstart")
    asked = dataclasses.replace(config, engine=EngineConfig(precision="bf16"))
    for before, cpu, gpu in ((None, "fp32", "tf32"), ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16")):
        assert with_precision(config, "cpu", before).engine.precision == cpu
        assert with_precision(config, "cuda", before).engine.precision == gpu
        assert with_precision(asked, "cuda", before) == asked
    assert with_precision(config, "cuda", "tf32").engine.precision == "tf32"
    with pytest.raises(ValueError, match="tf32.*GPU"):
        with_precision(config, "cpu", "tf32")
