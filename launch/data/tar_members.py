"""The members of tar archives: where each lies in the file, and whether the archive is whole."""

import posixpath
import tarfile
from pathlib import Path
from typing import NamedTuple

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.left_out import LeftOut

_BLOCK = 512  # bytes of a header, and of the zeros that end an archive


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Byte of the archive's file at which its content begins."""
    size: int
    """Bytes."""


def list_members(path: Path, omitted: LeftOut, part: Member | None = None) -> list[Member]:
    """The regular files of an archive in their order, and links to such under their own names; only headers are read.

    tarfile takes a damaged or missing header for the end of the archive, so the end is looked at here.

    Args:
        path: the file, not compressed.
        omitted: members that are neither files nor folders are counted in it.
        part: a member of it that is the archive to be listed. Offsets are those in the outer file all the same.

    Raises:
        ValueError: the archive is cut off or damaged; it is named.
    """
    begin, end = (0, path.stat().st_size) if part is None else (part.offset, part.offset + part.size)
    what = f"the archive {path}" if part is None else f"the archive {part.name} in {path}"
    infos: list[tarfile.TarInfo] = []
    last = "its beginning"
    with open(path, "rb") as file:
        file.seek(begin)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if not info.issparse() and (missing := info.offset_data + info.size - end) > 0:
                        raise ValueError(
                            f"{what} is incomplete: {missing:,} of the {info.size:,} bytes of its member {info.name} are "
                            "missing; download it again"
                        )
                    last = f"its member {info.name}"
                    if not info.isdir():
                        infos.append(info)
                after = tar.offset
        except tarfile.TarError as error:
            raise ValueError(f"{what} cannot be read ({error}); download it again") from None
        file.seek(after)
        if after + _BLOCK > end or any(file.read(_BLOCK)):
            raise ValueError(
                f"{what} is incomplete or damaged: after {last}, at byte {after - begin:,} of {end - begin:,}, there is neither "
                "another member nor the mark of its end; download it again"
            )
    return _files(infos, what, omitted)


def _files(infos: list[tarfile.TarInfo], what: str, omitted: LeftOut) -> list[Member]:
    links = {posixpath.normpath(info.name): _target(info) for info in infos if info.issym() or info.islnk()}
    files = {posixpath.normpath(info.name): info for info in infos if info.isreg()} if links else {}
    members = []
    for info in infos:
        end = posixpath.normpath(info.name)
        followed = set()
        while not info.isreg() and end in links and end not in followed:
            followed.add(end)
            end = links[end]
        content = info if info.isreg() else files.get(end)
        example = f"{info.name} in {what}"
        if content is None:
            omitted.add(left_out.DANGLING if followed else left_out.IRREGULAR, example)
        elif content.issparse():
            omitted.add(left_out.SPARSE, example)
        else:
            members.append(Member(info.name, content.offset_data, content.size))
    return members


def _target(info: tarfile.TarInfo) -> str:
    """The name that a link has for what it leads to, as the archive has it."""
    if info.islnk():
        return posixpath.normpath(info.linkname)
    return posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
