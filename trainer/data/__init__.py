"""Read a data set as batches of images on the device of the model."""

from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.dataset import Dataset, check_classes, open_dataset
from bitfleet.trainer.data.loaders import TrainLoader, ValidationLoader, dali_is_installed, decoder_of
from bitfleet.trainer.data.recent import RecentImages, remembering
from bitfleet.trainer.data.resizing import normalize
from bitfleet.trainer.data.stream import stream_settings

__all__ = [
    "DataConfig",
    "Dataset",
    "RecentImages",
    "TrainLoader",
    "ValidationLoader",
    "check_classes",
    "dali_is_installed",
    "decoder_of",
    "normalize",
    "open_dataset",
    "remembering",
    "stream_settings",
]
