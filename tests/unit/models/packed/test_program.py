"""Files of packed programs: their size, and foreign, damaged and later ones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from bitfleet.packed import load, read_description
from bitfleet.packed.program import Buffer, Kind, Operation, Program, assign_slots, to_bytes
from tests.unit.models.packed.networks import lowered, network

DESCRIPTION = {"classes": ["cat", "dog"]}


@pytest.fixture(scope="module")
def content() -> bytes:
    program = lowered(network("birealnet_small", width=8, num_classes=2), 28)
    return to_bytes(Program(program.operations, DESCRIPTION))


def test_description_comes_back(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(content)
    assert read_description(tmp_path / "net") == {"format": 1, **DESCRIPTION}
    runner = load(tmp_path / "net")
    assert (runner.image_size, runner.num_classes) == ((28, 28, 3), 2)


def test_same_network_same_bytes(content: bytes) -> None:
    program = lowered(network("birealnet_small", width=8, num_classes=2), 28)
    assert to_bytes(Program(program.operations, DESCRIPTION)) == content


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("birealnet18", 64, {}),
        ("birealnet18", 64, {"norm": "layer"}),
        ("birealnet34", 64, {"norm": "none"}),
        ("binarynet", 32, {}),
        ("xnornet", 224, {}),
        ("reactnet18", 64, {}),
        ("quicknet", 64, {}),
        ("real_to_binary", 64, {}),
    ],
)
def test_size_is_bits_and_floats(name: str, size: int, options: dict[str, Any]) -> None:
    model = network(name, **options)
    bits = sum(param.numel() for param in model.parameters() if getattr(param, "binary", False))
    floats = sum(param.numel() for param in model.parameters()) - bits
    assert len(to_bytes(lowered(model, size))) <= 1.05 * (bits / 8 + 4 * floats)


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    return message


def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net"
    assert "no file" in refused(path)
    assert refused(tmp_path)
    for foreign in (b"", b"PK\x03\x04 not a program", bytes(1000), content[:-1], content[:100]):
        path.write_bytes(foreign)
        assert "not a packed program" in refused(path)
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3, np.float32)}))
    assert "bitfleet export" in refused(path)


def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net"
    for place in np.linspace(len(content) // 2, len(content) - 1, 20, dtype=int):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        assert "damaged" in refused(path)


def test_damaged_descriptions_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_bytes(content)
    tensors = safetensors.numpy.load(content)
    other = {**read_description(path), "classes": ["cat", "cow"], "sha256": "0" * 64}
    for text in ("{", "[]", '{"format": 1}', '"text"', json.dumps(other)):
        path.write_bytes(safetensors.numpy.save(tensors, {"bitfleet": text}))
        assert "damaged" in refused(path)


def test_later_formats_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net"
    tensors = safetensors.numpy.load(content)
    path.write_bytes(safetensors.numpy.save(tensors, {"bitfleet": json.dumps({"format": 99})}))
    message = refused(path)
    assert "99" in message
    assert "update" in message


def test_slots_are_shared_by_buffers_that_are_not_alive_together() -> None:
    images = [Buffer(4, 4, 3) for _ in range(4)]
    operations = [
        Operation(Kind.AFFINE, images[0], images[1]),
        Operation(Kind.AFFINE, images[1], images[2]),
        Operation(Kind.ADD, images[2], images[3], other=images[1]),
    ]
    assert all(a is b for a, b in zip(assign_slots(operations), images, strict=True))
    slots = [image.slot for image in images]
    assert slots[2] == slots[0]
    assert slots[3] == slots[1] != slots[2]


def test_factors_and_joined_channels_keep_their_slots() -> None:
    """They are not read pixel by pixel before the result is written."""
    normalized, scaled, joined = Buffer(1, 1, 3), Buffer(1, 1, 3), Buffer(1, 1, 6)
    factors, other = Buffer(1, 1, 3), Buffer(1, 1, 3)
    operations = [
        Operation(Kind.SIGMOID, normalized, factors),
        Operation(Kind.SCALE, normalized, scaled, other=factors),
        Operation(Kind.SIGMOID, scaled, other),
        Operation(Kind.CONCAT, scaled, joined, other=other),
    ]
    assign_slots(operations)
    for operation in operations:
        read = {buffer.slot for buffer in (operation.source, operation.other) if buffer is not None}
        assert operation.target.slot not in read


def test_torch_is_not_needed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(content)
    code = (
        "import sys; sys.modules['torch'] = None\nimport numpy, bitfleet.packed, bitfleet.packed.pixels\nnetwork = "
        "bitfleet.packed.load(sys.argv[1])\nprint(network(numpy.zeros((1, 28, 28, 3), numpy.uint8)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "net"], capture_output=True, text=True)
    assert done.stdout == "(1, 2)\n", done.stderr
