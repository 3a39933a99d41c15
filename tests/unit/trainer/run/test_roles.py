"""The roles of fields, as the users of the former five lists need them."""

from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig
from bitfleet.trainer.run.roles import fields_with_role


def test_fields_of_each_role() -> None:
    assert fields_with_role(TrainConfig, "host") == {"data.root", "distill.cache"}
    assert fields_with_role(TrainConfig, "place") == {"output", "run_dir", "resume"}
    machine = "device num_threads memory_gib allow_incomplete on_bad_sample max_bad_samples stall_seconds"
    assert fields_with_role(DataConfig, "machine") == set(machine.split())
    assert fields_with_role(DataConfig, "execution") == {"loader", "val_batch_size"}
    of_run = fields_with_role(TrainConfig, "machine")
    assert of_run == {"device", "num_threads", "preflight", *(f"data.{name}" for name in machine.split())}


def test_a_part_gives_its_role_to_its_fields() -> None:
    habits = fields_with_role(TrainConfig, "habit")
    assert {"name", "stop_after_steps", "journal.enabled", "metrics.every_steps", "checkpoint.keep_last"} <= habits
    assert not any(name.startswith(("optim.", "model.", "data.", "engine.")) for name in habits)


def test_what_is_trained_has_no_role() -> None:
    every = fields_with_role(TrainConfig, "host", "machine", "execution", "place", "habit")
    assert not every & {"epochs", "seed", "global_batch_size", "data.image_size", "optim.gamma", "init"}
