"""ONNX models compute the trainer's logits in onnxruntime."""

import copy
import json
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from bitfleet.packed.onnx_format import to_onnx
from bitfleet.packed.program import Kind, Operation, Program
from tests.unit.models.packed.mixed import SIZE, mixed
from tests.unit.models.packed.networks import (
    exact_images,
    expected_logits,
    lowered,
    make_exact,
    network,
    random_images,
)
from tests.unit.models.packed.programs import random_image, random_program
from tests.unit.models.packed.reference import run as run_numpy

SMALL = {"num_classes": 7, "width": 12}
EXACT: list[tuple[str, int, dict[str, Any]]] = [
    ("birealnet_small", 32, SMALL),
    ("birealnet_small", 28, SMALL | {"norm": "none", "binarizer": "approx"}),
    ("birealnet_small", 31, SMALL | {"residual": "single", "binarizer": "hardtanh_tanh"}),
    ("birealnet_small", 45, SMALL | {"norm": "none", "residual": "single", "binarizer": "ste"}),
    ("birealnet18", 64, SMALL),
    ("birealnet18", 97, SMALL | {"norm": "none"}),
    ("birealnet34", 64, SMALL),
    ("binarynet", 32, {"width": 20}),
    ("reactnet_small", 31, SMALL),
    ("reactnet_a", 64, {"num_classes": 7, "width": 5}),
    ("quicknet", 70, {"num_classes": 7, "width": 12, "depths": (2, 2)}),
    ("binary_resnet_e18", 64, SMALL),
    ("real_to_binary", 64, {"num_classes": 7, "width": 8}),
]
"""Network, image size, options; many values before a sign are exactly 0."""
LAYER_NORM: list[tuple[str, int, dict[str, Any]]] = [
    ("birealnet_small", 29, SMALL | {"norm": "layer"}),
    ("birealnet18", 64, SMALL | {"norm": "layer", "residual": "single"}),
    ("birealnet34", 64, SMALL | {"norm": "layer"}),
    ("binarynet", 32, {"width": 20, "norm": "layer"}),
]


def name_of(value: object) -> str | None:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


def run(content: bytes, images: NDArray[Any]) -> NDArray[np.float32]:
    """Compute the logits of a batch in onnxruntime."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    logits: NDArray[np.float32] = session.run(["logits"], {"pixels": images.transpose(0, 3, 1, 2)})[0]
    return logits


def assert_close(found: Any, expected: Any) -> None:
    """Compare logits to 1e-4 of the largest."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "size", "options"), EXACT, ids=name_of)
def test_networks_with_values_of_exactly_0(name: str, size: int, options: dict[str, Any]) -> None:
    model, images = make_exact(network(name, **options)), exact_images(3, size)
    assert_close(run(to_onnx(lowered(model, size)), images), expected_logits(model, images))


@pytest.mark.parametrize(("name", "size", "options"), LAYER_NORM, ids=name_of)
def test_layer_norm(name: str, size: int, options: dict[str, Any]) -> None:
    model, images = network(name, **options), random_images(2, size)
    assert_close(run(to_onnx(lowered(model, size)), images), expected_logits(model, images))


def test_every_operation() -> None:
    model, images = mixed(), exact_images(8, SIZE)
    program, expected = lowered(model, SIZE), expected_logits(model, images)
    assert len(np.unique(expected, axis=0)) > 4
    np.testing.assert_array_equal(run(to_onnx(program), images), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("xnornet", {}), ("xnornet", {"norm": "layer"}), ("binary_alexnet", {})], ids=name_of
)
def test_networks_with_large_binary_matrices(name: str, options: dict[str, Any]) -> None:
    model, images = make_exact(network(name, **options)), exact_images(2, 224)
    assert_close(run(to_onnx(lowered(model, 224)), images), expected_logits(model, images))


@pytest.fixture(scope="module")
def program() -> Program:
    result = lowered(make_exact(network("birealnet_small", **SMALL)), 32)
    result.description.update(classes=["ant", "bee"])
    return result


def check(model: onnx.ModelProto) -> None:
    """Compare the shapes that a model gives with those that its operators give."""
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert {each.name: each for each in inferred.graph.value_info} == {
        each.name: each for each in model.graph.value_info
    }


def takes_all_rows(operation: Operation) -> bool:
    """Return True if no row is left that another window could take, as in ONNX."""
    o = operation
    rows = o.source.height + o.top - (o.target.height - 1) * o.stride - o.kernel[0]
    columns = o.source.width + o.left - (o.target.width - 1) * o.stride - o.kernel[1]
    windows = (Kind.CONV, Kind.BINARY_CONV, Kind.DEPTHWISE, Kind.MAX_POOL, Kind.AVG_POOL)
    return o.kind not in windows or max(rows, columns) < o.stride


def test_random_programs() -> None:
    """Compare random programs with numpy, of every kind of operation."""
    kinds: set[Kind] = set()
    for seed in range(300):
        random = random_program(seed)
        image = random_image(random, seed)
        expected = run_numpy(random.operations, image)
        if expected.has_ties or not all(map(takes_all_rows, random.operations)):
            continue
        content = to_onnx(random)
        check(onnx.load_from_string(content))
        assert_close(run(content, image[None])[0], expected.logits.astype(np.float32))
        kinds |= {operation.kind for operation in random.operations}
    assert kinds == set(Kind)


def test_models_are_valid_and_say_what_they_are(program: Program) -> None:
    model = onnx.load_from_string(to_onnx(program))
    check(model)
    assert "Sign" not in {node.op_type for node in model.graph.node}
    (batch, *sides), (_, classes) = (
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (model.graph.input[0], model.graph.output[0])
    )
    assert (batch, sides, classes) == ("N", [3, 32, 32], 7)
    assert json.loads(model.metadata_props[0].value) == program.description


def test_pixels_may_be_floats(program: Program) -> None:
    images = exact_images(5, 32)
    found = run(to_onnx(program, np.float32), images.astype(np.float32))
    np.testing.assert_array_equal(found, run(to_onnx(program), images))


def test_every_batch_size_gives_the_same(program: Program) -> None:
    content, images = to_onnx(program), exact_images(5, 32)
    together = run(content, images)
    np.testing.assert_array_equal(np.concatenate([run(content, image[None]) for image in images]), together)


def test_unknown_operations(program: Program) -> None:
    changed = copy.deepcopy(program)
    changed.operations[2].kind = Mock()
    changed.operations[2].kind.name = "PRELU"
    with pytest.raises(ValueError, match="ONNX models of bitfleet do not have the operation PRELU"):
        to_onnx(changed)
