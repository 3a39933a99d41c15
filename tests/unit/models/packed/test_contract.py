"""A packed program computes what the trainer's network computes: the same integers in every binary
layer on every instruction set, and the same logits."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.quantizers import ste_sign
from tests.unit.models.packed.networks import (
    PATHS,
    exact_images,
    expected_logits,
    expected_sums,
    lowered,
    make_exact,
    network,
    packed,
    packed_sums,
    random_images,
)

SMALL = {"num_classes": 7, "width": 24}
"""Channels that fill no word of 64."""
EXACT: list[tuple[str, int, dict[str, Any]]] = [
    *(
        ("birealnet_small", size, SMALL | {"norm": norm, "residual": residual, "binarizer": binarizer})
        for size, norm, residual, binarizer in (
            (32, "batch", "double", "ste"),
            (28, "none", "double", "approx"),
            (31, "batch", "single", "hardtanh_tanh"),
            (45, "none", "single", "ste"),
        )
    ),
    ("birealnet18", 64, {"num_classes": 10, "width": 20}),
    ("birealnet18", 97, {"num_classes": 10, "width": 16, "norm": "none"}),
    ("birealnet34", 64, {"num_classes": 10, "width": 8}),
    ("binarynet", 32, {"width": 20}),
]
NEWER: list[tuple[str, int, dict[str, Any]]] = [
    ("reactnet_small", 32, SMALL),
    ("reactnet_small", 29, {"num_classes": 7, "width": 64, "depths": (2, 2)}),
    ("reactnet18", 64, {"num_classes": 7, "width": 8}),
    ("reactnet_a", 64, {"num_classes": 7, "width": 5, "binarizer": "ste"}),
    ("reactnet_a", 47, {"num_classes": 7, "width": 32}),
    ("quicknet", 64, {"num_classes": 7, "width": 20, "depths": (2, 2)}),
    ("quicknet", 75, {"num_classes": 7, "width": 64, "depths": (1, 2)}),
    ("quicknet_small", 66, {"num_classes": 7, "width": 8, "depths": (2, 1)}),
    ("binary_resnet_e18", 64, {"num_classes": 7, "width": 12}),
    ("binary_resnet_e18", 34, {"num_classes": 7, "width": 20, "depths": (2, 2), "stem": "small"}),
    ("real_to_binary", 64, {"num_classes": 7, "width": 16}),
    ("real_to_binary", 75, {"num_classes": 7, "width": 64, "depths": (2, 1)}),
]
"""Widths of 64 run through what AVX-512 has for whole words."""
DEEP: list[tuple[str, int, dict[str, Any]]] = [
    ("reactnet_a", 64, {"num_classes": 7, "width": 8}),
    ("quicknet", 97, {"num_classes": 7, "width": 12}),
    ("quicknet_large", 64, {"num_classes": 7, "width": 8}),
    ("real_to_binary", 64, {"num_classes": 7, "width": 8}),
    ("binary_resnet_e18", 64, {"num_classes": 7, "width": 8}),
]
LAYER_NORM: list[tuple[str, int, dict[str, Any]]] = [
    ("birealnet_small", 32, SMALL | {"norm": "layer"}),
    ("birealnet18", 64, {"num_classes": 10, "width": 8, "norm": "layer"}),
    ("binarynet", 32, {"width": 20, "norm": "layer"}),
]
LARGE: list[tuple[str, int, dict[str, Any]]] = [
    ("binarynet", 32, {}),
    ("xnornet", 224, {}),
    ("birealnet18", 224, {}),
    ("binary_alexnet", 224, {}),
    ("reactnet18", 224, {}),
    ("reactnet_a", 224, {}),
    ("binary_resnet_e18", 224, {}),
    ("quicknet", 224, {"depths": (4, 4)}),
    ("real_to_binary", 224, {"depths": (4, 4)}),
]


def test_every_network_is_checked() -> None:
    networks = {
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("bitfleet.models.")
    }
    assert networks == {name for name, *_ in EXACT + NEWER + DEEP + LARGE}


def name_of(value: object) -> str | None:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


def assert_close(found: Any, expected: Any) -> None:
    """Compare logits to 1e-4 of the largest."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def check(name: str, size: int, options: dict[str, Any], num_images: int = 2) -> None:
    """Compare integers and logits on every path of a network that does not round."""
    model = make_exact(network(name, **options))
    program = lowered(model, size)
    images = exact_images(num_images, size)
    logits = expected_logits(model, images)
    assert np.abs(logits).max() > 1e-2
    expected = [expected_sums(model, image) for image in images]
    assert all((one != other).any() for one, other in zip(expected[0], expected[-1], strict=True))
    for path in PATHS:
        runner = packed(program, path)
        assert_close(runner(images), logits)
        for image, sums in zip(images, expected, strict=True):
            assert all(row.std() > 0 for row in sums)
            for found, wanted in zip(packed_sums(program, runner, image), sums, strict=True):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("name", "size", "options"), EXACT + NEWER, ids=name_of)
def test_integers_equal_the_trainers(name: str, size: int, options: dict[str, Any]) -> None:
    check(name, size, options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "options"), [*LARGE, ("xnornet", 224, {"norm": "layer"})], ids=name_of)
def test_integers_equal_the_trainers_at_full_size(name: str, size: int, options: dict[str, Any]) -> None:
    check(name, size, options)


@pytest.mark.parametrize(("name", "size", "options"), LAYER_NORM, ids=name_of)
def test_integers_equal_the_trainers_with_layer_norm(name: str, size: int, options: dict[str, Any]) -> None:
    check(name, size, options)


@pytest.mark.parametrize(("name", "size", "options"), EXACT[::3] + LAYER_NORM + DEEP, ids=name_of)
def test_logits_of_any_weights(name: str, size: int, options: dict[str, Any]) -> None:
    """Compare networks that round. One image in some thousands has a value within rounding of 0."""
    model = network(name, **options)
    images = random_images(4, size)
    assert_close(packed(lowered(model, size))(images), expected_logits(model, images))


class SignsOfEnds(nn.Module):
    """Binary layers at the image and behind the mean of all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = QuantConv2d(3, 9, 3, input_quantizer=ste_sign)
        self.last = QuantLinear(9, 4, input_quantizer=ste_sign)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x).mean((2, 3)))
        return logits


def test_signs_of_the_image_and_of_a_mean() -> None:
    torch.manual_seed(0)
    model = SignsOfEnds().eval()
    program = lowered(model, 12)
    (image,) = random_images(1, 12)
    for path in PATHS:
        found = packed_sums(program, packed(program, path), image)
        for sums, expected in zip(found, expected_sums(model, image), strict=True):
            np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_images_of_a_batch_do_not_touch_each_other(count: int) -> None:
    model = make_exact(network("birealnet_small", **SMALL))
    runner = packed(lowered(model, 28))
    images = exact_images(count, 28)
    batch = runner(images)
    assert_close(batch, expected_logits(model, images))
    np.testing.assert_array_equal(batch, np.concatenate([runner(image[None]) for image in images]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "num_threads"), [("birealnet18", 2), ("birealnet18", 3), ("quicknet", 3)])
def test_threads_give_the_same_bits(path: str, name: str, num_threads: int) -> None:
    program = lowered(network(name, num_classes=10, width=20), 64)
    runner = packed(program, path)
    images = random_images(2, 64)
    np.testing.assert_array_equal(runner(images, num_threads), runner(images))
    for one, more in zip(
        packed_sums(program, runner, images[0]), packed_sums(program, runner, images[0], num_threads), strict=True
    ):
        np.testing.assert_array_equal(one, more)


def test_uint8_and_float_pixels_are_the_same_images() -> None:
    runner = packed(lowered(network("birealnet_small", **SMALL), 28))
    images = random_images(2, 28)
    np.testing.assert_array_equal(runner(images), runner(images.astype(np.float32)))
