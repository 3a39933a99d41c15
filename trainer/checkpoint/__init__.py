"""Checkpoints: write, find, verify and load them."""

from bitfleet.trainer.checkpoint.checkpoints import Checkpoints, TrainState, identity, was_compiled
from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.checkpoint.format import is_checkpoint, latest_checkpoint, model_signature, read_meta, verify
from bitfleet.trainer.checkpoint.initial_weights import load_initial_weights, seed_everything, seed_state
from bitfleet.trainer.checkpoint.loader import ValidCheckpoint, find_resume_checkpoint, load_model
from bitfleet.trainer.checkpoint.run_folder import RunFolder, choose_run_folder, create_and_lock

__all__ = [
    "CheckpointConfig",
    "Checkpoints",
    "RunFolder",
    "TrainState",
    "ValidCheckpoint",
    "choose_run_folder",
    "create_and_lock",
    "find_resume_checkpoint",
    "identity",
    "is_checkpoint",
    "latest_checkpoint",
    "load_initial_weights",
    "load_model",
    "model_signature",
    "read_meta",
    "seed_everything",
    "seed_state",
    "verify",
    "was_compiled",
]
