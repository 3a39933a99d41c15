"""Text files that are there whole or not at all."""

import os
from pathlib import Path

from bitfleet.trainer.checkpoint.format import flush_folder


def replace(path: Path, text: str) -> None:
    """Write `text` to `path`, in UTF-8; its folder is made if need be.

    Who reads meanwhile sees the old or the new file whole, and so does who reads after a crash of the machine.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a name that reaches the disk before its content is an empty file
    os.replace(temporary, path)
    flush_folder(path.parent)
