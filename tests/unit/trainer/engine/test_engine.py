import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer
from bitfleet.trainer.engine.config import EngineConfig, deepspeed_options, resolve_precision
from bitfleet.trainer.engine.engine import autocast, backward, create_engine, load_engine


def options(tmp_path: Path, extra: Any = None, **fields: Any) -> dict[str, Any]:
    path = None
    if extra is not None:
        path = tmp_path / "deepspeed.json"
        path.write_text(extra if isinstance(extra, str) else json.dumps(extra), errors="surrogateescape")
    return deepspeed_options(EngineConfig(deepspeed=path, **fields), global_batch_size=64, num_replicas=4, world_size=2)


def test_configuration_fills_what_it_owns(tmp_path: Path) -> None:
    filled = options(tmp_path, sharding="zero2", precision="bf16")
    assert filled["train_micro_batch_size_per_gpu"] == 16
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["gradient_clipping"] == 0.0
    assert filled["zero_optimization"] == {"stage": 2}
    assert filled["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_user_options_pass_through(tmp_path: Path) -> None:
    assert options(tmp_path)["timers"] == {"throughput": {"enabled": False}}
    timers = {"throughput": {"enabled": True, "synchronized": False}}
    extra = {"timers": timers, "zero_optimization": {"reduce_bucket_size": 7, "stage": 1}}
    filled = options(tmp_path, extra, sharding="zero1")
    assert filled["timers"] == timers
    assert filled["zero_optimization"] == {"reduce_bucket_size": 7, "stage": 1}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"zero_optimisation": {"stage": 1}},
            'no DeepSpeed option "zero_optimisation"; did you mean "zero_optimization"',
        ),
        ({"gradient_cliping": 1.0}, 'did you mean "gradient_clipping"'),
        ({"train_batch_size": 32}, '"train_batch_size" to 32, but the configuration makes it 64 .*global_batch_size'),
        ({"gradient_clipping": 1.0}, '"gradient_clipping" to 1.0'),
        ({"zero_optimization": {"stage": 3}}, '"zero_optimization.stage" to 3, but .* 0 .*engine.sharding'),
        ({"bf16": {"enabled": True}}, '"bf16", which belongs to the field engine.precision'),
        ({"optimizer": {"type": "Adam"}}, '"optimizer", which belongs to the field optim'),
        ("{", "are not JSON"),
        ("\udcff", r"options .*\.json are not JSON"),
        ("[]", "must be a JSON object, not list"),
    ],
)
def test_bad_options_are_named(extra: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        options(tmp_path, extra)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothere\.json"):
        deepspeed_options(
            EngineConfig(deepspeed=tmp_path / "nothere.json"), global_batch_size=1, num_replicas=1, world_size=1
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"check_every_steps": 0}, "check_every_steps must be at least 1"),
        ({"sharding": "zero1", "grad_comm_dtype": "bf16"}, 'need engine.sharding "bits", not "zero1"'),
        ({"sharding": "none", "max_grad_norm": 1.0}, 'need engine.sharding "bits", not "none"'),
        ({"sharding": "zero1", "precision": "fp16"}, 'precision "fp16" needs engine.sharding "bits", which scales'),
        ({"on_nonfinite": "stop", "precision": "fp16"}, 'precision "fp16" finds its loss scale by steps that are not'),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)


class Hostile:
    """Unpickles into a call."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.victim,)  # type: ignore[return-value]


class FakeEngine:
    """As much of DeepSpeed's engine as loading needs."""

    checkpoint_engine: Any = None

    def load_checkpoint(self, folder: str, tag: str) -> tuple[Any, dict[str, Any]]:
        return self.checkpoint_engine.load(f"{folder}/{tag}", map_location="cpu"), {}


def test_deepspeeds_files_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"exp_avg": torch.ones(3)}, tmp_path / "good")
    load_engine(FakeEngine(), tmp_path, "good")
    torch.save({"exp_avg": Hostile(tmp_path / "victim")}, tmp_path / "bad")
    with pytest.raises(ValueError, match="more than tensors"):
        load_engine(FakeEngine(), tmp_path, "bad")
    assert not (tmp_path / "victim").exists()


def test_misspelt_nested_keys_are_refused(tmp_path: Path) -> None:
    """DeepSpeed itself would ignore unknown keys in these sections."""
    for section, key, near in (
        ("activation_checkpointing", "partition_activation", "partition_activations"),
        ("flops_profiler", "enabld", "enabled"),
        ("data_types", "grad_acum_dtype", "grad_accum_dtype"),
    ):
        with pytest.raises(ValueError, match=f'"{section}.{key}".*"{section}.{near}"'):
            options(tmp_path, {section: {key: True}})


@pytest.fixture
def one_rank(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of one rank, where DeepSpeed builds an engine for the CPU; it remembers
    groups of earlier tests."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    from deepspeed.utils import groups

    monkeypatch.setattr(groups, "_WORLD_GROUP", None)


@pytest.mark.usefixtures("one_rank")
def test_device_is_the_one_that_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that sees one GPU as number 0 keeps it, whatever LOCAL_RANK says; and DeepSpeed
    measures no throughput."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    from deepspeed.accelerator import get_accelerator

    current: list[int] = []
    monkeypatch.setattr(type(get_accelerator()), "set_device", lambda self, index: current.append(index))

    def build(device: torch.device, **fields: Any) -> Any:
        model = create_model(ModelConfig(name="birealnet_small", width=8, num_classes=4))
        optimizer, schedules = build_optimizer(model, OptimConfig(), num_steps=10)
        settings = deepspeed_options(EngineConfig(**fields), global_batch_size=4, num_replicas=1, world_size=1)
        return create_engine(model, ShardedOptimizer(optimizer), schedules, settings, device)

    engine = build(torch.device("cuda", 0))
    assert (current, engine.local_rank) == ([0], 3)
    assert engine.tput_timer.config.enabled is False
    build(torch.device("cpu"))  # which has no number: DeepSpeed's own, which means nothing there
    assert current == [0, 3]
    with pytest.raises(ValueError, match='"zero3" .*LOCAL_RANK.* 3.* 0'):
        build(torch.device("cuda", 0), sharding="zero3")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_engine_computes_in_the_precision_and_scales_no_loss(precision: Any, dtype: torch.dtype) -> None:
    """DeepSpeed would make a GradScaler for fp16, whose step waits for the device."""
    model = create_model(ModelConfig(name="birealnet_small", width=8, num_classes=4))
    optimizer, schedules = build_optimizer(model, OptimConfig(), num_steps=10)
    settings = deepspeed_options(EngineConfig(precision=precision), global_batch_size=4, num_replicas=1, world_size=1)
    sharded = ShardedOptimizer(optimizer)
    engine = create_engine(model, sharded, schedules, settings, torch.device("cpu"))
    images, labels = torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 2, 3])
    logits: torch.Tensor = engine(images)
    assert logits.dtype == dtype
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    backward(engine, loss, sharded)
    assert engine.torch_autocast_z0_gradscaler is None
    with autocast(torch.device("cpu"), precision):
        assert model.eval()(images).dtype == dtype
    engine.step()
    assert engine.optimizer.num_skipped_steps == 0


def test_precision_of_a_device() -> None:
    assert [resolve_precision("auto", device) for device in ("cpu", "cuda")] == ["fp32", "tf32"]
    for precision in ("fp32", "bf16", "fp16"):
        assert resolve_precision(precision, "cpu") == resolve_precision(precision, "cuda") == precision  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"tf32" .*CPU.* fp32'):
        resolve_precision("tf32", "cpu")
