"""ImageNet and CIFAR-10 in miniature, in every form that `bitfleet data prepare` knows: 3 synsets,
12 + 6 photos."""

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets import imagenet as torchvision_imagenet

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.archives import DEVKIT_FILE, TRAIN_FILE, VAL_FILE

SYNSETS = ("n01440764", "n01443537", "n02105855")
BRIGHTNESS = (30, 120, 210)
# ILSVRC's ids are not in alphabetical order; the non-leaf synsets come after the leaves.
ID_OF = {"n02105855": 1, "n01440764": 2, "n01443537": 3, "n00001740": 4, "n00002137": 5}
NUM_CHILDREN = {"n00001740": 2, "n00002137": 1}
VAL_SYNSETS = ("n01443537", "n02105855", "n02105855", "n01440764", "n01443537", "n01440764")
TRAIN_PER_CLASS = 4


def photo(label: int, number: int) -> bytes:
    """A photo whose brightness is its label's and whose size is its number's; number 3 is a PNG, as
    one of ImageNet is."""
    encoded = io.BytesIO()
    pixels = np.full((30 + label, 40 + number, 3), BRIGHTNESS[label], np.uint8)
    pixels[0, 0] = number
    Image.fromarray(pixels).save(encoded, format="PNG" if number == 3 else "JPEG")
    return encoded.getvalue()


def train_photos() -> dict[str, bytes]:
    """ "<synset>/<file>" -> content, in no order."""
    return {
        f"{synset}/{synset}_{number}.JPEG": photo(label, number)
        for label, synset in reversed(list(enumerate(SYNSETS)))
        for number in (10, 2, 3, 1)
    }


def val_photos() -> dict[str, bytes]:
    """ "<file>" -> content."""
    return {
        f"ILSVRC2012_val_{number:08d}.JPEG": photo(SYNSETS.index(synset), 20 + number)
        for number, synset in enumerate(VAL_SYNSETS, start=1)
    }


def val_by_class() -> dict[str, bytes]:
    """ "<synset>/<file>" -> content."""
    return {f"{synset}/{name}": photo for synset, (name, photo) in zip(VAL_SYNSETS, val_photos().items(), strict=True)}


def tar(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    """An archive of `files`."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def tar_files(path: Path) -> dict[str, bytes]:
    """The files of an archive."""
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive if info.isreg()}  # type: ignore[union-attr]


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write `files` below `folder`."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ILSVRC2012 be the miniature."""
    monkeypatch.setattr(imagenet, "synsets", lambda: SYNSETS)
    counts = imagenet.Counts(name="ILSVRC2012", train=12, val=6, least_train_per_class=TRAIN_PER_CLASS, val_per_class=2)
    monkeypatch.setattr(imagenet, "ILSVRC2012", counts)
    md5 = hashlib.md5(devkit()).hexdigest()
    monkeypatch.setitem(torchvision_imagenet.ARCHIVE_META, "devkit", (DEVKIT_FILE, md5))


def devkit() -> bytes:
    """ILSVRC2012_devkit_t12.tar.gz with a meta.mat of the real structure; the same bytes every
    time."""
    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    rows = np.empty((len(ID_OF), 1), dtype=[(name, object) for name in fields])
    for row, (synset, number) in enumerate(ID_OF.items()):
        children = NUM_CHILDREN.get(synset, 0)
        rows[row, 0] = (
            float(number),
            synset,
            f"word, of {synset}",
            "a gloss",
            float(children),
            np.arange(1.0, children + 1)[None],
            float(children > 0),
            float(TRAIN_PER_CLASS if not children else 0),
        )
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": rows})
    truth = "".join(f"{ID_OF[synset]}\n" for synset in VAL_SYNSETS)
    files = {
        # the first 116 bytes of the file are text with the time in it
        "meta.mat": b"MATLAB 5.0 MAT-file".ljust(116) + meta.getvalue()[116:],
        "ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    return gzip.compress(tar({f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in files.items()}), mtime=0)


def archives(folder: Path) -> Path:
    """The three archives; the classes and images of them are in no order."""
    photos = train_photos()
    inner = {
        f"{synset}.tar": tar({name.split("/")[1]: data for name, data in photos.items() if name.startswith(synset)})
        for synset in (SYNSETS[1], SYNSETS[2], SYNSETS[0])
    }
    flat = dict(reversed(val_photos().items()))
    return write(folder, {TRAIN_FILE: tar(inner), VAL_FILE: tar(flat), DEVKIT_FILE: devkit()})


def class_folders(folder: Path) -> Path:
    """train/<synset>/ and val/<synset>/."""
    write(folder / "train", train_photos())
    write(folder / "val", val_by_class())
    return folder


def kaggle(folder: Path) -> Path:
    """The folder above ILSVRC/."""
    images = folder / "ILSVRC/Data/CLS-LOC"
    write(images / "train", train_photos())
    write(images / "val", val_photos())
    write(images / "test", {"ILSVRC2012_test_00000001.JPEG": photo(0, 1)})
    rows = [
        f"{Path(name).stem},{synset} 1 2 3 4 {SYNSETS[0]} 5 6 7 8 "
        for name, synset in zip(val_photos(), VAL_SYNSETS, strict=True)
    ]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")
    return folder


def shards(folder: Path, *, form: str = "cls") -> Path:
    """Two shards of training images, with a label as .cls or .json, and one of validation images
    below val/."""
    samples = list(train_photos().items())
    splits = {"imagenet-train-0001.tar": samples[:5], "imagenet-train-0000.tar": samples[5:]}
    splits["val/0.tar"] = list(val_by_class().items())
    for name, part in splits.items():
        files: dict[str, bytes] = {}
        for path, data in part:
            label, key = SYNSETS.index(path.split("/")[0]), path.split("/")[1].removesuffix(".JPEG")
            files[f"{key}.cls" if form == "cls" else f"{key}.json"] = (
                b"%d" % label if form == "cls" else json.dumps({"label": label, "filename": path}).encode()
            )
            files[f"{key}.jpg"] = data
        write(folder, {name: tar(files)})
    return folder


CIFAR_CLASSES = ("airplane", "automobile", "bird")


def cifar_pixels(split: str) -> list[np.ndarray]:
    """Batches of images, uint8 [6, 32, 32, 3]; image i of a batch has the label i % 3."""
    generator = np.random.default_rng(len(split))
    return [generator.integers(0, 255, (6, 32, 32, 3), np.uint8) for _ in range(2 if split == "train" else 1)]


def cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """cifar-10-batches-py/ with two batches of six images and a test batch."""
    files = {"batches.meta": pickle.dumps({"label_names": list(CIFAR_CLASSES)})}
    for split, names in (("train", ("data_batch_1", "data_batch_2")), ("val", ("test_batch",))):
        for name, pixels in zip(names, cifar_pixels(split), strict=True):
            rows = pixels.transpose(0, 3, 1, 2).reshape(6, -1)
            files[name] = pickle.dumps({"data": rows, "labels": [i % 3 for i in range(6)]})
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    counts = imagenet.Counts(name="CIFAR-10", train=12, val=6, least_train_per_class=4, val_per_class=2)
    monkeypatch.setattr(imagenet, "CIFAR10", counts)
    write(folder / "cifar-10-batches-py", files)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def images_of(dest: Path) -> dict[str, bytes]:
    """The images of a DEST: "<split>/<synset>/<file>" -> content."""
    return {name: data for name, data in tree(dest).items() if name.startswith(("train/", "val/"))}


def extracted() -> dict[str, bytes]:
    """Return what images_of should give of a prepared DEST."""
    files = {f"train/{name}": data for name, data in train_photos().items()}
    return files | {f"val/{name}": data for name, data in val_by_class().items()}
