"""Check that a rank can read its data: the lists, and the first and last images."""

from typing import NamedTuple

from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.dataset import open_dataset
from bitfleet.trainer.data.stall import call_within


class Readable(NamedTuple):
    """The data as one rank sees it."""

    summary: str
    """Size of the data set, in words; "" if it cannot be read."""
    sha: str
    """sha256 of its lists; "" if it cannot be read."""
    num_quarantined: int
    """Images that `bitfleet data verify` set aside."""
    problem: str
    """Why it cannot be read; "" if it can."""


def readable(config: DataConfig) -> Readable:
    """Open the data set and read four images, as training would, within data.stall_seconds."""
    try:
        dataset = open_dataset(config)
        for images in (dataset.train, dataset.val):
            for index in sorted({0, len(images) - 1}):
                path = images.folder / images.name(index)
                encoded = call_within(lambda i=index, of=images: of.read(i), config.stall_seconds, path)  # type: ignore[misc]
                if len(encoded) != images.sizes[index]:
                    raise ValueError(f"{path} has {len(encoded):,} bytes, in the list {images.sizes[index]:,}")
    except (ValueError, OSError) as error:
        return Readable("", "", 0, " ".join(str(error).split()))
    return Readable(dataset.summary(), dataset.sha, dataset.num_quarantined, "")
