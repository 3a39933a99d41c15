"""Data for the trainer: what to read, in which order, and as what."""

from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.dataset import Dataset, open_dataset
from bitfleet.trainer.data.decoded_images import decoder_of
from bitfleet.trainer.data.loaders import TrainLoader, ValidationLoader
from bitfleet.trainer.data.normalize import normalize

__all__ = ["DataConfig", "Dataset", "TrainLoader", "ValidationLoader", "decoder_of", "normalize", "open_dataset"]
