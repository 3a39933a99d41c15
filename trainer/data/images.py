"""A list of images: where each lies, its label and its size."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageList:
    """The images of one split in a fixed order. N images; 1.28 M of ImageNet take about 100 MB."""

    folder: Path
    """What the names are relative to."""
    names: npt.NDArray[np.bytes_]
    """"train/<class>/<file>", or "<shard>.tar/<member>" for one in a shard: bytes of the file system, NUL-padded [N]."""
    labels: npt.NDArray[np.int64]
    """Class index [N]."""
    heights: npt.NDArray[np.int32]
    """Pixels, as stored in the file (EXIF orientation is not applied) [N]."""
    widths: npt.NDArray[np.int32]
    """Pixels, as stored in the file [N]."""
    sizes: npt.NDArray[np.int64]
    """Bytes of the encoded image [N]."""
    offsets: npt.NDArray[np.int64] | None = None
    """Byte at which the image begins in its shard [N]; None where every image is a file of its own."""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The name of image `index` as text."""
        return os.fsdecode(bytes(self.names[index]))

    def path(self, index: int) -> str:
        """The absolute path of image `index` as text; for one in a shard, the shard's path and the member's name."""
        return f"{self.folder}/{self.name(index)}"

    def read(self, index: int) -> bytes:
        """The encoded image `index`.

        Raises:
            OSError: it is missing, cannot be read, or its shard ends before it does.
        """
        if self.offsets is None:
            return Path(self.path(index)).read_bytes()
        shard, _ = shard_and_member(self.name(index))
        size = int(self.sizes[index])
        with open(self.folder / shard, "rb") as file:
            encoded = os.pread(file.fileno(), size, int(self.offsets[index]))
        if len(encoded) != size:
            raise OSError(f"the shard {self.folder / shard} ends within the image")
        return encoded

    def select(self, kept: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "ImageList":
        """The images at `kept`, a mask or positions."""
        return ImageList(
            folder=self.folder,
            names=self.names[kept],
            labels=self.labels[kept],
            heights=self.heights[kept],
            widths=self.widths[kept],
            sizes=self.sizes[kept],
            offsets=None if self.offsets is None else self.offsets[kept],
        )


def shard_and_member(name: str) -> tuple[str, str]:
    """Split the name of an image in a shard: "train/000001.tar/a.jpg" is ("train/000001.tar", "a.jpg")."""
    end = name.lower().index(".tar/") + len(".tar")
    return name[:end], name[end + 1 :]
