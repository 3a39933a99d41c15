"""Keys of samples, as the webdataset library has them, and what belongs to which."""

from collections.abc import Sequence

import pytest

from bitfleet.launch.data.shard_samples import samples
from bitfleet.launch.data.tar_members import Member
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.left_out import LeftOut

JPEG = b"\xff\xd8\xff\xe0"


def pairs(names: Sequence[str], heads: dict[str, bytes] | None = None) -> tuple[list[tuple[str, str | None]], LeftOut]:
    omitted = LeftOut()
    members = [Member(name, index, 4) for index, name in enumerate(names)]
    found = samples(members, "the shard", omitted, lambda member: (heads or {}).get(member.name, b""))
    return [(sample.image.name, sample.label and sample.label.name) for sample in found], omitted


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.jpg", "0.cls"], [("0.jpg", "0.cls")]),
        (["0.cls", "0.JPEG"], [("0.JPEG", "0.cls")]),
        (["a/0.jpg", "b/0.cls", "b/0.jpg", "a/0.cls"], [("a/0.jpg", "a/0.cls"), ("b/0.jpg", "b/0.cls")]),
        (["v1.2/0.jpg", "v1.2/0.cls"], [("v1.2/0.jpg", "v1.2/0.cls")]),
        (["./0.jpg", "./0.cls"], [("./0.jpg", "./0.cls")]),
        (["0.image.jpg", "0.cls"], [("0.image.jpg", "0.cls")]),
        (["0.image.jpg", "0.target.cls", "0.json"], [("0.image.jpg", "0.json")]),
        (["p.1.jpg", "p.1.cls", "p.2.jpg", "p.2.json"], [("p.1.jpg", "p.1.cls"), ("p.2.jpg", "p.2.json")]),
        (["0.jpg", "0.json", "0.cls"], [("0.jpg", "0.cls")]),
        (["0.jpg"], [("0.jpg", None)]),
        (["é.jpe", "é.cls"], [("é.jpe", "é.cls")]),
    ],
)
def test_pairs(names: list[str], expected: list[tuple[str, str | None]]) -> None:
    found, omitted = pairs(names)
    assert found == expected
    assert set(omitted.counts) <= {left_out.NO_IMAGE}
    assert omitted.counts == ({left_out.NO_IMAGE: 1} if "0.target.cls" in names else {})


def test_content_says_what_a_suffix_does_not() -> None:
    found, omitted = pairs(["0.img", "0.cls", "1.bin", "1.cls"], {"0.img": JPEG, "1.bin": b"mp3"})
    assert found == [("0.img", "0.cls")]
    assert omitted.counts == {left_out.NO_IMAGE: 1}


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["1.cls"], {left_out.NO_IMAGE: 1}),
        (["1.json"], {left_out.NO_IMAGE: 1}),
        (["1.cls", "1.gif"], {left_out.NO_IMAGE: 1}),
        (["1.mp3"], {"files named *.mp3, not images that are read": 1}),
        (["0.png"], {left_out.DOUBLE: 1}),
        (["0.jpg"], {left_out.DOUBLE: 1}),
        (["0.cls"], {left_out.DOUBLE: 1}),
        (["0.seg.png", "0.depth.png"], {left_out.SIDE_IMAGE: 2}),
        (["1.left.jpg", "1.right.jpg"], {left_out.DOUBLE: 1}),
        (["p.1.jpg", "p.1.cls", "p.2.cls"], {left_out.NO_IMAGE: 1}),
        (["README", "a/b"], {left_out.NO_SUFFIX: 2}),
        ([".hidden.jpg", "a/.1.cls"], {left_out.HIDDEN: 2}),
        (["._0.jpg", "__MACOSX/0.jpg", "a/.DS_Store"], {left_out.SYSTEM: 3}),
        (["0.txt", "0.meta.json"], {}),
    ],
)
def test_what_belongs_to_no_sample_is_counted(names: list[str], counts: dict[str, int]) -> None:
    found, omitted = pairs(["0.jpg", "0.cls", *names])
    assert found[0] == ("0.jpg", "0.cls")
    assert omitted.counts == counts


def test_two_images_of_one_sample_are_named() -> None:
    _, omitted = pairs(["0.jpg", "0.png", "0.cls"])
    assert omitted.examples == {left_out.DOUBLE: "0.*: 0.jpg and 0.png in the shard"}
