"""Shards that are compressed, unpacked once: an image is read by its offset, which a compressed file has not."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitfleet.launch.data.unfinished import being_written
from bitfleet.trainer.data.workers import run_jobs

_OPEN: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
    ".tar": open,
}
SHARD_SUFFIXES = tuple(_OPEN)
"""What the names of shards end in, in lower case."""
_CHUNK = 1 << 22


class _Damaged(Exception):
    """A shard that cannot be read; the message says why."""


class _Job(NamedTuple):
    source: Path
    dest: Path


def is_compressed(shard: str) -> bool:
    """Whether a shard has to be unpacked."""
    return not shard.lower().endswith(".tar")


def unpack(folder: Path, shards: Sequence[str], into: Path, *, num_workers: int) -> list[str]:
    """Write each shard of `folder` uncompressed into `into`, or what is missing there; returns their new names.

    Raises:
        ValueError: a shard is cut off or damaged; all such are named.
    """
    names = [_unpacked_name(shard) for shard in shards]
    if len(set(names)) < len(names):
        twice = [shard for shard, name in zip(shards, names, strict=True) if names.count(name) > 1]
        raise ValueError(f"the shards {' and '.join(twice[:2])} in {folder} are one shard twice: remove one of them")
    jobs = [_Job(folder / shard, into / name) for shard, name in zip(shards, names, strict=True)]
    reasons = run_jobs(_unpack, jobs, [1] * len(jobs), num_workers=num_workers, title="shards")
    if damaged := [reason for reason in reasons if reason]:
        raise ValueError("; ".join(damaged))
    return names


def _unpacked_name(shard: str) -> str:
    suffix = next(suffix for suffix in SHARD_SUFFIXES if shard.lower().endswith(suffix))
    return shard[: -len(suffix)] + ".tar"


def _unpack(job: _Job) -> str:
    """Write a shard; returns why it cannot be read, or ""."""
    if job.dest.exists():
        return ""
    try:
        with being_written(job.dest) as unfinished, open(unfinished, "wb") as file:
            for chunk in _chunks(job.source):
                file.write(chunk)
    except _Damaged as error:
        return f"the shard {job.source} cannot be unpacked ({error}); download it again"
    return ""


def _chunks(path: Path) -> Iterator[bytes]:
    suffix = next(suffix for suffix in SHARD_SUFFIXES if path.name.lower().endswith(suffix))
    try:
        with _OPEN[suffix](path, "rb") as packed:
            while chunk := packed.read(_CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _Damaged(str(error)) from None
