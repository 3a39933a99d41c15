"""`bitfleet export --format onnx` and qonnx."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from bitfleet.launch.export import onnx_export
from bitfleet.launch.export.command import export
from bitfleet.launch.export.export import load_trained, logits_of
from bitfleet.packed.program import Program

OPTIONS = "--config fashion_quickstart --model.width 8".split()
OFFICIAL = "--data.augmentation random_resized_crop --data.preprocessing official".split()


def images(size: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (3, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("extra", "dtype"), [([], np.uint8), (OFFICIAL, np.float32)])
def test_onnx(
    extra: list[str], dtype: type[Any], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "net.onnx"
    export([str(weights), str(output), "--format", "onnx", *OPTIONS, *extra])
    text = capsys.readouterr().out
    assert f"{output}: " in text
    assert f'input "pixels" {np.dtype(dtype)} [N, 3, 32, 32]' in text
    assert "18,432 binary weights" in text
    assert "checked on 16 random images" in text
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"pixels": images().transpose(0, 3, 1, 2).astype(dtype)})[0]
    trained = load_trained(weights, [*OPTIONS, *extra])
    expected = logits_of(trained.model, images(), trained.config.data)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    description = json.loads(session.get_modelmeta().custom_metadata_map["bitfleet"])
    assert description["network"] == "birealnet_small"
    assert description["preprocessing"]["image_size"] == 32


def test_qonnx_at_another_size(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "net"
    export([str(weights), str(output), "--format", "qonnx", "--image_size", "30", *OPTIONS])
    text = capsys.readouterr().out
    assert 'input "pixels" float32 [1, 3, 30, 30]' in text
    assert "in qonnx" in text
    assert {opset.domain for opset in onnx.load(output).opset_import} == {"", "qonnx.custom_op.general"}
    found = onnx_export.QonnxNetwork(output.read_bytes())(images(30))
    trained = load_trained(weights, OPTIONS)
    expected = logits_of(trained.model, images(30), trained.config.data)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["onnx", "qonnx"])
def test_wrong_models_are_not_written(
    name: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = getattr(onnx_export, f"to_{name}")

    def wrong(program: Program, *arguments: Any) -> bytes:
        operations = copy.deepcopy(program.operations)
        changed = next(o for o in operations if o.weight is not None and o.weight.dtype == bool)
        assert changed.weight is not None
        changed.weight[0] ^= True
        content: bytes = convert(Program(operations, program.description), *arguments)
        return content

    monkeypatch.setattr(onnx_export, f"to_{name}", wrong)
    output = tmp_path / "net"
    with pytest.raises(ValueError, match=f"the {name.upper()} model disagrees with the network"):
        export([str(weights), str(output), "--format", name, *OPTIONS])
    assert not output.exists()


def test_missing_packages(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "qonnx", None)
    with pytest.raises(ValueError, match=r"\A--format onnx needs onnxruntime: pip install 'bitfleet\[export\]'\Z"):
        export([str(weights), str(tmp_path / "net"), "--format", "onnx", *OPTIONS])
    with pytest.raises(ValueError, match=r"\A--format qonnx needs onnxruntime and qonnx: pip install"):
        export([str(weights), str(tmp_path / "net"), "--format", "qonnx", *OPTIONS])
    assert not (tmp_path / "net").exists()


def test_unknown_formats(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*tflite[^\n]*\Z"):
        export([str(weights), str(tmp_path / "net"), "--format", "tflite", *OPTIONS])
