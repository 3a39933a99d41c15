"""Unpack Fashion-MNIST, the embedded default, to class folders of PNG files.

Fashion-MNIST is by Zalando SE, under the MIT licence: see fashion_mnist/LICENSE.txt.
"""

import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.trainer.data.cache import cache_folder, exclusive

SUBSET_ROOT = "fashion-mnist"
FULL_ROOT = "fashion-mnist-full"

_CLASSES = (
    "0_t-shirt",
    "1_trouser",
    "2_pullover",
    "3_dress",
    "4_coat",
    "5_sandal",
    "6_shirt",
    "7_sneaker",
    "8_bag",
    "9_ankle-boot",
)
_SUBSET_FILE = Path(__file__).parent / "fashion_mnist" / "subset.npz"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_DEBIAN_STEMS = {"train": "train", "val": "t10k"}

ImagesByClass = dict[str, list[npt.NDArray[np.uint8]]]
"""Split name -> images of each class, uint8 [count, 28, 28], in the order of _CLASSES."""


def fashion_mnist_root(name: str) -> Path:
    """Return the class folders of an embedded data set, unpacked into the cache.

    The tree is written under another name and renamed when complete. Its name has a hash of the
    source, so changed data is unpacked again.

    Args:
        name: "fashion-mnist" (6,000 + 1,000 images, in this repository) or "fashion-mnist-full"
            (60,000 + 10,000, from Debian's package dataset-fashion-mnist).

    Raises:
        ValueError: The package of the full set is not installed, or the cache cannot be written.
    """
    sources = [_SUBSET_FILE] if name == SUBSET_ROOT else debian_files()
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    root = cache_folder() / f"{name}-{digest.hexdigest()[:16]}"
    if not root.is_dir():
        with exclusive(root):
            if not root.is_dir():
                _write_tree(root, load_subset() if name == SUBSET_ROOT else load_full())
    return root


def debian_files() -> list[Path]:
    """Return the four files of dataset-fashion-mnist; raise a ValueError if one is missing."""
    files = [
        _DEBIAN_FOLDER / f"{stem}-{kind}-ubyte.gz"
        for stem in _DEBIAN_STEMS.values()
        for kind in ("images-idx3", "labels-idx1")
    ]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"data.root={FULL_ROOT!r} needs {file}, which is missing: apt-get install dataset-fashion-mnist, "
                f"or use the embedded data.root={SUBSET_ROOT!r}"
            )
    return files


def load_subset() -> ImagesByClass:
    """Read the embedded subset: 600 training and 100 validation images per class."""
    with np.load(_SUBSET_FILE, allow_pickle=False) as arrays:
        return {split: list(arrays[split]) for split in _DEBIAN_STEMS}


def load_full() -> ImagesByClass:
    """Read all of Fashion-MNIST from Debian's package (IDX format: headers of 16 and 8 bytes)."""
    images_by_class: ImagesByClass = {}
    for split, stem in _DEBIAN_STEMS.items():
        with gzip.open(_DEBIAN_FOLDER / f"{stem}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(_DEBIAN_FOLDER / f"{stem}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        images_by_class[split] = [images[labels == label] for label in range(len(_CLASSES))]
    return images_by_class


def _write_tree(root: Path, images_by_class: ImagesByClass) -> None:
    unfinished = root.with_name(f".tmp-{root.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # from a killed process: the caller holds the lock
    for split, classes in images_by_class.items():
        for class_name, images in zip(_CLASSES, classes, strict=True):
            folder = unfinished / split / class_name
            folder.mkdir(parents=True)
            for index, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{index:06d}.png")
    unfinished.rename(root)
