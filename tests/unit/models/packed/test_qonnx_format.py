"""QONNX models compute the trainer's logits in qonnx's own executor."""

from typing import Any

import numpy as np
import onnx
import pytest
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx

from bitfleet.packed.program import Kind
from bitfleet.packed.qonnx_format import to_qonnx
from tests.unit.models.packed.networks import (
    exact_images,
    expected_logits,
    expected_sums,
    lowered,
    make_exact,
    network,
    random_images,
)

EXACT: list[tuple[str, dict[str, Any]]] = [
    ("binarynet", {}),
    ("birealnet_small", {"width": 12}),
    ("birealnet_small", {"width": 8, "norm": "none", "residual": "single"}),
    ("reactnet_small", {"width": 8}),
    ("quicknet", {"width": 8, "depths": (2, 1)}),
    ("real_to_binary", {"width": 8, "depths": (1, 1)}),
]


def assert_close(found: Any, expected: Any) -> None:
    """Compare logits to 1e-4 of the largest."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "options"), EXACT)
def test_integers_logits_and_signs_of_0(name: str, options: dict[str, Any]) -> None:
    model, image = make_exact(network(name, **options)), exact_images(1, 32)
    program = lowered(model, 32)
    wrapper = ModelWrapper(onnx.load_from_string(to_qonnx(program)))
    pixels = image.transpose(0, 3, 1, 2).astype(np.float32)
    values = execute_onnx(wrapper, {"pixels": pixels}, return_full_exec_context=True)
    assert_close(values["logits"], expected_logits(model, image))
    found = [
        values[f"{index}_binary_conv_conv"].transpose(0, 2, 3, 1).reshape(-1)
        for index, operation in enumerate(program.operations)
        if operation.kind is Kind.BINARY_CONV
    ]
    expected = expected_sums(model, image[0])
    assert len(found) == len(expected)
    for sums, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(sums, wanted)
    nodes = [node for node in wrapper.graph.node if node.op_type == "BipolarQuant"]
    zeros = [values[node.output[0]][values[node.input[0]] == 0] for node in nodes]
    assert sum(map(len, zeros)) > 0
    assert all((signs == 1).all() for signs in zeros)
    weights = [node for node in nodes if node.name.endswith("bipolar_weight")]
    assert len(weights) == sum(getattr(param, "binary", False) for param in model.parameters())


def test_layer_norm() -> None:
    model, image = network("binarynet", norm="layer"), random_images(1, 32)
    wrapper = ModelWrapper(onnx.load_from_string(to_qonnx(lowered(model, 32))))
    found = execute_onnx(wrapper, {"pixels": image.transpose(0, 3, 1, 2).astype(np.float32)})
    assert_close(found["logits"], expected_logits(model, image))


def test_tools_of_qonnx_know_the_signs() -> None:
    """Datatype inference, with which FINN starts, finds 1-bit tensors."""
    from qonnx.core.datatype import DataType
    from qonnx.transformation.infer_datatypes import InferDataTypes

    program = lowered(network("birealnet_small"), 32)
    model = ModelWrapper(onnx.load_from_string(to_qonnx(program))).transform(InferDataTypes())
    outputs = [node.output[0] for node in model.graph.node if node.op_type == "BipolarQuant"]
    assert {model.get_tensor_datatype(name) for name in outputs} == {DataType["BIPOLAR"]}
    assert len(outputs) == 2 * 6
