"""A packed data set as WebDataset shards: tar files of KEY.jpg and KEY.cls, the label in ASCII."""

import io
import os
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.launch.data.packed_files import Packed, read_packed
from bitfleet.launch.data.unfinished import being_written
from bitfleet.trainer.data.images import ImageList, shard_and_member

_IMAGES_PER_SHARD = 1000
_BYTES_PER_SHARD = 100_000_000


class ShardJob(NamedTuple):
    """The images of one shard."""

    images: ImageList
    names: Sequence[str]
    """"<shard>.tar/<KEY>.jpg" of each image."""
    path: Path
    """The shard."""
    folder: Path
    """The unfinished folder."""
    short_side: int


def shard_names(images: ImageList, split: str, num_bytes: npt.NDArray[np.int64]) -> list[str]:
    """Name each image: "<split>/<number of the shard>.tar/<running number>-<stem>.jpg".

    Args:
        images: All images of the split, in order. Where each goes depends on this list alone.
        split: "train" or "val".
        num_bytes: About what each will take [N].
    """
    names: list[str] = []
    shard, count, total = 0, 0, 0
    for index, size in enumerate(num_bytes.tolist()):
        if count == _IMAGES_PER_SHARD or (count and total + size > _BYTES_PER_SHARD):
            shard, count, total = shard + 1, 0, 0
        count, total = count + 1, total + size
        stem = os.path.splitext(os.path.basename(images.name(index)))[0].replace(".", "_")  # a dot ends a key
        names.append(f"{split}/{shard:06d}.tar/{index:07d}-{stem}.jpg")
    return names


def shard_jobs(images: ImageList, names: Sequence[str], folder: Path, short_side: int) -> list[ShardJob]:
    """Make a job of each shard that `names` has."""
    shards = np.array([shard_and_member(name)[0] for name in names], np.str_)
    starts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(names)] if names else []
    return [
        ShardJob(
            images.select(np.arange(start, end)), names[start:end], folder / str(shards[start]), folder, short_side
        )
        for start, end in pairwise(starts)
    ]


def pack_shard(job: ShardJob) -> Packed:
    """Write a shard; one that is there already, with the same members, is kept."""
    if (packed := _read_back(job)) is not None:
        return packed
    labels = job.images.labels.tolist()
    with being_written(job.path) as file, tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as shard:
        for index, name in enumerate(job.names):
            jpeg, _, _ = read_packed(job.images, index, job.short_side)
            member = shard_and_member(name)[1]
            _add(shard, member, jpeg)
            _add(shard, _label_name(member), b"%d" % labels[index])
    packed = _read_back(job)
    assert packed is not None
    return packed


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of time 0 and owner 0: the same input gives the same bytes
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def _label_name(member: str) -> str:
    return member.removesuffix("jpg") + "cls"


def _read_back(job: ShardJob) -> Packed | None:
    """Where the images of the shard begin and how large they are; None if it is not there, not whole or another."""
    members = [shard_and_member(name)[1] for name in job.names]
    packed = []
    try:
        with tarfile.open(job.path) as shard:
            infos = shard.getmembers()
            if [info.name for info in infos] != [name for member in members for name in (member, _label_name(member))]:
                return None
            for info in infos[::2]:
                with Image.open(shard.extractfile(info)) as image:  # type: ignore[arg-type]
                    packed.append((image.height, image.width, info.size, info.offset_data))
    except (OSError, tarfile.TarError, SyntaxError, ValueError):
        return None
    return np.array(packed, np.int64)
