"""`bitfleet run` on images and validation sets, and what it refuses."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.launch.run.classify import bars
from bitfleet.launch.run.command import run
from bitfleet.packed import PackedNetwork
from bitfleet.packed.program import Program, to_bytes
from tests.conftest import write_images
from tests.unit.models.packed.networks import expected_logits, lowered, network

NAMES = ["cat", "dog", "a long name"]
DESCRIPTION = {"classes": NAMES, "preprocessing": {"geometry": "crop", "image_size": 28}}


@pytest.fixture(scope="module")
def content() -> bytes:
    return to_bytes(Program(lowered(network("birealnet_small", width=8, num_classes=3), 28).operations, DESCRIPTION))


@pytest.fixture
def program(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "net"
    path.write_bytes(content)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(path)
    return path


def test_bars(content: bytes) -> None:
    found = bars(np.log(np.array([0.3, 0.7, 1e-6], np.float32)), PackedNetwork(content, DESCRIPTION), 3)
    assert found.splitlines() == [
        f"  dog           70.0 %  {'█' * 21}",
        f"  cat           30.0 %  {'█' * 9}",
        "  a long name    0.0 %",
    ]


def test_classes_of_images(program: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([str(program), str(image), str(image), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(f"{image}  (")
    logits = expected_logits(network("birealnet_small", width=8, num_classes=3), np.asarray(Image.open(image))[None])
    assert lines[1].split("  ")[1].strip() == NAMES[logits.argmax()]
    assert lines[1].count("█") >= lines[2].count("█")


def test_validation_set(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_images(tmp_path / "images", num_classes=3, train=1, val=4)
    description = DESCRIPTION | {"classes": ["class0", "class1", "class2"]}
    model = network("birealnet_small", width=8, num_classes=3)
    program = tmp_path / "net"
    program.write_bytes(to_bytes(Program(lowered(model, 28).operations, description)))
    run([str(program), "--data", str(root)])
    text = capsys.readouterr().out
    files = sorted((root / "val").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
    correct = expected_logits(model, images).argmax(1) == np.repeat(np.arange(3), 4)
    assert f"top-1 {correct.mean():.2%}" in text
    assert "12 images" in text
    run([str(program), "--data", str(root), "--limit", "5"])
    assert "5 images" in capsys.readouterr().out
    # As `bitfleet export FILE` leaves them where the data are not at hand.
    description |= {"classes": ["0", "1", "2"]}
    program.write_bytes(to_bytes(Program(lowered(model, 28).operations, description)))
    run([str(program), "--data", str(root)])
    assert capsys.readouterr().out.split("%")[0] == text.split("%")[0]


def test_validation_set_without_dali(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    root = write_images(tmp_path / "images", num_classes=3, train=1, val=4)
    description = DESCRIPTION | {"classes": ["class0", "class1", "class2"]}
    model = network("birealnet_small", width=8, num_classes=3)
    program.write_bytes(to_bytes(Program(lowered(model, 28).operations, description)))
    run([str(program), "--data", str(root)])


def refused(*arguments: object) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        run([str(argument) for argument in arguments])
    return str(caught.value)


def test_refusals_name_the_fault(program: Path, image: Path, tmp_path: Path) -> None:
    assert "--data" in refused(program)
    assert "--data" in refused(program, image, "--data", tmp_path)
    assert "--limit goes with --data" in refused(program, image, "--limit", "3")
    assert "--top goes with images" in refused(program, "--data", tmp_path, "--top", "3")
    assert "image.png" in refused(image, image)
    assert "nowhere.png" in refused(program, tmp_path / "nowhere.png")
    assert str(program) in refused(program, program)
    image.write_bytes(image.read_bytes()[:200])
    assert "image.png" in refused(program, image)
    Image.new("F", (28, 28)).save(tmp_path / "image.tif")
    assert "image.tif cannot be read: TIFF, mode F: its range of brightness" in refused(program, tmp_path / "image.tif")
    assert "nowhere" in refused(program, "--data", tmp_path / "nowhere")
    root = write_images(tmp_path / "images", num_classes=2, train=1, val=1)
    assert "2 classes" in refused(program, "--data", root)


def test_an_image_too_large_for_pillow(program: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "image.png cannot be read: Image size" in refused(program, image)
