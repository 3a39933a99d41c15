"""Write the files of a prepared data set: manifest.json, its lists, and the quarantine."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from bitfleet.trainer.data.image_list import FILE, FORMAT, QUARANTINE, Manifest, list_bytes, sha_of
from bitfleet.trainer.run.files import write_atomically


def write_manifest(manifest: Manifest, folder: Path) -> str:
    """Write `manifest` into `folder`, manifest.json last; return the sha256 of its lists.

    Raises:
        ValueError: A path has a tab or a line break in it, or a file cannot be written.
    """
    lists = {split: list_bytes(images) for split, images in manifest.splits}
    sha = sha_of(list(lists.values()))
    for split, text in lists.items():
        write_file(folder / f"{split}.tsv", text)
    in_folder = manifest.folder.resolve() == folder.resolve()
    content = {
        "format": FORMAT,
        "layout": manifest.layout,
        "files": "." if in_folder else str(manifest.folder.absolute()),
        "images": {split: len(images) for split, images in manifest.splits},
        "bytes": {split: int(images.sizes.sum()) for split, images in manifest.splits},
        "longest_path": max(images.names.itemsize for _, images in manifest.splits),
        "sha256": sha,
        **manifest.facts,
        "classes": list(manifest.classes),
    }
    write_file(folder / FILE, (json.dumps(content, indent=1) + "\n").encode())
    return sha


def write_quarantine(folder: Path, reasons: Mapping[str, str]) -> None:
    """Set images aside, name -> reason; readers of the data set leave them out.

    Raises:
        ValueError: The list cannot be written.
    """
    lines = ["path\treason", *(f"{name}\t{' '.join(reason.split())}" for name, reason in sorted(reasons.items()))]
    write_file(folder / QUARANTINE, os.fsencode("\n".join(lines) + "\n"))


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a data set atomically.

    Raises:
        ValueError: It cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): fix that and rerun the same command") from None
