import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from bitfleet import c_library
from bitfleet.models import QuantConv2d, approx_sign, hardtanh_tanh_sign, ste_sign, wide_ste_sign
from bitfleet.models.layers import binary_conv, layers
from bitfleet.models.layers.quantizers import Quantizer

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
pytestmark = needs_compiler
QUANTIZERS = [ste_sign, wide_ste_sign, approx_sign, hardtanh_tanh_sign]
SHAPES = [  # channels, outputs, kernel, stride, padding, height, width
    (16, 8, 3, 1, "same", 12, 11),
    (64, 64, 3, 2, "same", 14, 14),
    (100, 20, 5, 1, "same", 9, 13),
    (130, 33, 3, 1, "valid", 8, 8),
    (64, 128, 1, 1, "valid", 4, 4),
    (3, 5, 7, 2, "same", 17, 20),
    (64, 16, 3, 3, "same", 15, 16),
    (64, 16, 3, 2, 1, 14, 14),
    (65, 9, 5, 1, 3, 7, 6),
]


def wild(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers on both sides of +-1, many of them exactly on it, zeros of both signs,
    channels_last."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for place, value in enumerate((0.0, -0.0, 1.0, -1.0, 1.0001, -1.25, 1.26, -1e-42, torch.inf, -torch.inf)):
        x.view(-1)[place::53] = value
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def results(layer: QuantConv2d, x: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    """Output and gradients."""
    x, layer.weight.grad = x.clone().requires_grad_(), None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    assert x.grad is not None
    assert layer.weight.grad is not None
    return {"output": out.detach(), "input": x.grad, "weight": layer.weight.grad}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def float_results(layer: QuantConv2d, x: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    """The same by torch's convolutions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "can_pack", lambda *_: False)
        return results(layer, x, autocast=autocast)


@pytest.mark.parametrize("pad_value", [0, 1])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=["ste", "wide_ste", "approx", "hardtanh_tanh"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["fp32", "fp32 autocast", "bf16 autocast"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_float_convolutions(
    shape: tuple[int, ...], dtype: torch.dtype, autocast: bool, quantizer: Quantizer, pad_value: int
) -> None:
    channels, outputs, kernel, stride, padding, height, width = shape
    layer = QuantConv2d(
        channels, outputs, kernel, stride, padding=padding, pad_value=pad_value, input_quantizer=quantizer
    )
    x = wild(3, channels, height, width, dtype=dtype)
    assert_same_bits(results(layer, x, autocast=autocast), float_results(layer, x, autocast=autocast))


@pytest.mark.parametrize("pad_value", [0, 1])
@pytest.mark.parametrize(("padding", "sides"), [("same", (0, 1, 0, 1)), (1, (1, 1, 1, 1)), (2, (2, 2, 2, 2))])
def test_padding_and_its_value(padding: int | str, sides: tuple[int, ...], pad_value: int) -> None:
    layer = QuantConv2d(70, 9, 3, 2, padding=padding, pad_value=pad_value, input_quantizer=ste_sign)
    x = wild(2, 70, 8, 6)
    padded = F.pad(torch.where(x >= 0, 1.0, -1.0), sides, value=pad_value)
    assert torch.equal(layer(x), F.conv2d(padded, layer.weight, stride=2))


def test_only_zeros_and_ones_are_padded() -> None:
    with pytest.raises(ValueError, match="pad_value is -1; expected 0 or 1"):
        QuantConv2d(4, 4, 3, pad_value=-1, input_quantizer=ste_sign)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 65, 8, 8), (2, 32, 8, 8), (64, 8, 8)], ids=str)
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    layer, x = QuantConv2d(64, 8, 3, input_quantizer=ste_sign), torch.ones(shape)
    with pytest.raises(ValueError, match=re.escape(f"got an input {list(shape)}; expected [N, 64, H, W]")):
        layer(x.contiguous(memory_format=layout) if x.dim() == 4 else x)


def test_an_input_smaller_than_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("3x3 pixels does not fit an input [1, 64, 2, 5]")):
        QuantConv2d(64, 8, 3, padding="valid", input_quantizer=ste_sign)(wild(1, 64, 2, 5))


def test_tensors_without_memory_are_not_read() -> None:
    x = wild(2, 64, 8, 8)
    with pytest.raises(ValueError, match="has no weights yet"):
        QuantConv2d(64, 8, 3, input_quantizer=ste_sign).to("meta")(x)
    layer = QuantConv2d(64, 8, 3, input_quantizer=ste_sign)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (2, 8, 8, 8)


def test_a_nan_counts_as_plus_one() -> None:
    layer = QuantConv2d(8, 8, 3, input_quantizer=ste_sign)
    x = wild(1, 8, 5, 5)
    x[0, :, 2, 2] = torch.nan
    assert_same_bits(results(layer, x, autocast=False), float_results(layer, x, autocast=False))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_number_of_threads(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary_conv, "MIN_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    layer, x = QuantConv2d(70, 24, 3, 2, input_quantizer=ste_sign), wild(2, 70, 9, 9)
    assert_same_bits(results(layer, x, autocast=False), float_results(layer, x, autocast=False))


@pytest.fixture
def new_library() -> Iterator[None]:
    binary_conv._library.cache_clear()
    yield
    binary_conv._library.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.usefixtures("new_library")
def test_without_vectors_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "FLAGS", ("-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC"))
    layer, x = QuantConv2d(100, 20, 5, 2, input_quantizer=approx_sign), wild(2, 100, 9, 13)
    assert_same_bits(results(layer, x, autocast=False), float_results(layer, x, autocast=False))


@pytest.mark.usefixtures("new_library")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer, x = QuantConv2d(16, 8, 3, input_quantizer=ste_sign), wild(2, 16, 5, 5)
    expected = results(layer, x, autocast=False)
    binary_conv._library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="binary convolutions .*no C compiler"):
        found = results(layer, x, autocast=False)
    assert_same_bits(found, expected)
    results(layer, x, autocast=False)  # an error if it warned again


def custom(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, -1.0)


def with_one_weight(layer: QuantConv2d, value: float) -> QuantConv2d:
    """Make the last weight `value`, as the rule bnew does."""
    with torch.no_grad():
        layer.weight[-1, -1, -1, -1] = value
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, x: (layer, x.contiguous()),
        lambda layer, x: (layer.double(), x.double()),
        lambda layer, x: (layer.to(torch.bfloat16), x.to(torch.bfloat16)),
        lambda layer, x: (QuantConv2d(16, 8, 3, input_quantizer=custom), x),
        lambda layer, x: (with_one_weight(layer, 0.5), x),
        lambda layer, x: (with_one_weight(layer, 0.0), x),
        lambda layer, x: (with_one_weight(layer, 1.0 + 2**-23), x),
    ],
    ids=["contiguous", "double", "bfloat16 weights", "another quantizer", "a real weight", "a zero", "nearly 1"],
)
def test_what_stays_with_torch(
    change: Callable[[QuantConv2d, Tensor], tuple[QuantConv2d, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "binary_conv2d", None)  # an error if it were called
    layer, x = change(QuantConv2d(16, 8, 3, input_quantizer=ste_sign), wild(2, 16, 6, 6))
    out = layer(x)
    assert layer.input_quantizer is not None
    assert torch.equal(out, F.conv2d(layer.input_quantizer(x), layer.weight, padding=1))
    assert out.stride() == F.conv2d(x, layer.weight, padding=1).stride()


def test_evaluation_keeps_nothing() -> None:
    layer, x = QuantConv2d(64, 8, 3, input_quantizer=ste_sign), wild(2, 64, 6, 6)
    expected = layer(x).detach()
    with torch.no_grad():
        out = layer(x)
    assert out.grad_fn is None
    assert torch.equal(out, expected)


def test_a_window_of_the_whole_input_is_a_product() -> None:
    torch.manual_seed(0)
    layer = QuantConv2d(64, 32, 6, padding="valid", input_quantizer=ste_sign)
    x = wild(3, 64, 6, 6)
    signs = ste_sign(x)
    found = results(layer, x, autocast=False)
    assert torch.equal(found["output"], F.conv2d(signs, layer.weight))
    weight = layer.weight.detach().clone().requires_grad_()
    grad = torch.randn(3, 32, 1, 1, generator=torch.Generator().manual_seed(1))
    F.conv2d(signs, weight).backward(grad)
    assert found["weight"].is_contiguous()
    torch.testing.assert_close(found["weight"], weight.grad)


def test_second_derivatives_are_refused() -> None:
    layer, x = QuantConv2d(8, 8, 3, input_quantizer=approx_sign), wild(1, 8, 5, 5).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_meta_makes_the_tensors_of_a_cpu() -> None:
    layer = QuantConv2d(64, 8, 3, 2, input_quantizer=ste_sign).to("meta")
    x = wild(2, 64, 6, 6).to("meta").requires_grad_()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), binary_conv.meta_is_cpu(True):
        out = layer(x)
        out.sum().backward()
    assert sum(kept) == 2 * 7 * 7 * 8 + layer.weight.numel() // 8 + x.numel() // 8
    assert x.grad is not None
    assert x.grad.shape == x.shape
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), binary_conv.meta_is_cpu(False):
        kept.clear()
        layer(x)
    assert sum(kept) > 4 * x.numel()
