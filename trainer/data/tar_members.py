"""The members of tar archives: where each lies in the file, and whether the archive is whole."""

import tarfile
from pathlib import Path
from typing import NamedTuple

_BLOCK = 512  # bytes of a header, and of the zeros that end an archive


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Byte of the archive's file at which its content begins."""
    size: int
    """Bytes."""


def list_members(path: Path, part: Member | None = None) -> list[Member]:
    """The regular files of an archive in their order; only headers are read.

    tarfile takes a damaged or missing header for the end of the archive, so the end is looked at here.

    Args:
        path: the file, not compressed.
        part: a member of it that is the archive to be listed. Offsets are those in the outer file all the same.

    Raises:
        ValueError: the archive is cut off or damaged; it is named.
    """
    begin, end = (0, path.stat().st_size) if part is None else (part.offset, part.offset + part.size)
    what = f"the archive {path}" if part is None else f"the archive {part.name} in {path}"
    members: list[Member] = []
    last = "its beginning"
    with open(path, "rb") as file:
        file.seek(begin)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if (missing := info.offset_data + info.size - end) > 0:
                        raise ValueError(
                            f"{what} is incomplete: {missing:,} of the {info.size:,} bytes of its member {info.name} are "
                            "missing; download it again"
                        )
                    last = f"its member {info.name}"
                    if info.isreg():
                        members.append(Member(info.name, info.offset_data, info.size))
                after = tar.offset
        except tarfile.TarError as error:
            raise ValueError(f"{what} cannot be read ({error}); download it again") from None
        file.seek(after)
        if after + _BLOCK > end or any(file.read(_BLOCK)):
            raise ValueError(
                f"{what} is incomplete or damaged: after {last}, at byte {after - begin:,} of {end - begin:,}, there is neither "
                "another member nor the mark of its end; download it again"
            )
    return members
