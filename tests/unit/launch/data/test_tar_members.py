"""Members of archives of every type: files, links to files, and what is neither."""

import io
import tarfile
from pathlib import Path

from bitfleet.launch.data.tar_members import list_members
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.left_out import LeftOut

LONG = "d/" * 90 + "é" * 60 + ".jpg"


def add(
    archive: tarfile.TarFile, name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    archive.addfile(info, io.BytesIO(data))


def test_links_are_their_files_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a", kind=tarfile.DIRTYPE)
        add(archive, "a/0.jpg", b"zero")
        add(archive, "a/hard.jpg", kind=tarfile.LNKTYPE, link="a/0.jpg")
        add(archive, "a/soft.jpg", kind=tarfile.SYMTYPE, link="0.jpg")
        add(archive, "b/up.jpg", kind=tarfile.SYMTYPE, link="../a/soft.jpg")
        add(archive, "./dot.jpg", kind=tarfile.SYMTYPE, link="late.jpg")
        add(archive, "late.jpg", b"late!")
        add(archive, "/abs.jpg", b"abs")
        add(archive, "../out.jpg", b"out")
        add(archive, LONG, b"long")
        add(archive, "old.jpg", b"old type", kind=tarfile.AREGTYPE)
        add(archive, "gone.jpg", kind=tarfile.SYMTYPE, link="nowhere.jpg")
        add(archive, "outside.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(archive, "self.jpg", kind=tarfile.SYMTYPE, link="self.jpg")
        add(archive, "folder.jpg", kind=tarfile.SYMTYPE, link="a")
        add(archive, "pipe.jpg", kind=tarfile.FIFOTYPE)
        add(archive, "device", kind=tarfile.CHRTYPE)
    omitted = LeftOut()
    content = path.read_bytes()
    found = {member.name: content[member.offset :][: member.size] for member in list_members(path, omitted)}
    assert found == {
        "a/0.jpg": b"zero",
        "a/hard.jpg": b"zero",
        "a/soft.jpg": b"zero",
        "b/up.jpg": b"zero",
        "./dot.jpg": b"late!",
        "late.jpg": b"late!",
        "/abs.jpg": b"abs",
        "../out.jpg": b"out",
        LONG: b"long",
        "old.jpg": b"old type",
    }
    assert omitted.counts == {left_out.DANGLING: 4, left_out.IRREGULAR: 2}
    assert omitted.examples[left_out.DANGLING] == f"gone.jpg in the archive {path}"


def test_a_sparse_member_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("0.jpg")
        info.pax_headers = {"GNU.sparse.map": "0,4,1000000,0", "GNU.sparse.size": "1000000"}
        info.size = 4
        archive.addfile(info, io.BytesIO(b"data"))
        add(archive, "1.jpg", b"one")
    omitted = LeftOut()
    assert [member.name for member in list_members(path, omitted)] == ["1.jpg"]
    assert omitted.counts == {left_out.SPARSE: 1}
