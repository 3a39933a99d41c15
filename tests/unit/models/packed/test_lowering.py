"""Any network of known operators is lowered to what torch computes, or refused by one sentence."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.quantizers import ste_sign
from bitfleet.models.layers.real_layers import BatchNorm, ChannelBias, SameDepthwiseConv2d
from bitfleet.packed.program import Flag, Kind, Program
from tests.unit.models.packed.networks import (
    PATHS,
    expected_logits,
    expected_sums,
    lowered,
    network,
    packed,
    packed_sums,
    random_images,
)

SIZE = 12
"""Height and width of the images."""
CHANNELS = 6


class Net(nn.Module):
    """A convolution of the image, what is tested, and the mean of all pixels."""

    def __init__(self, body: Callable[["Net", Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.stem = nn.Conv2d(3, CHANNELS, 3)
        self.layers = nn.ModuleList(layers)
        self.scalar = nn.Parameter(torch.tensor([0.7]))
        self.columns = nn.Parameter(torch.ones(SIZE - 2))
        self.filters = nn.Parameter(torch.randn(5, CHANNELS, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, 12, 12] -> logits."""
        x = self.body(self, self.stem(x))
        return x.mean((2, 3)) if x.ndim == 4 else x


def net(body: Callable[[Net, Tensor], Tensor], *layers: nn.Module) -> nn.Module:
    """Return a network with random values of all layers."""
    model = Net(body, *layers).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
        if isinstance(module, BatchNorm | nn.PReLU | ChannelBias):
            for param in module.parameters():
                param.data.normal_(0.3)
    return model


def signs(outputs: int = CHANNELS, pad_value: int = 0, stride: int = 1) -> QuantConv2d:
    return QuantConv2d(CHANNELS, outputs, 3, stride, pad_value=1 if pad_value else 0, input_quantizer=ste_sign)


def norm(channels: int = CHANNELS) -> BatchNorm:
    return BatchNorm(channels, momentum=0.9, eps=1e-5)


def rising() -> nn.Module:
    """Return a network whose signs rise with the sums, but for the factors of the norm."""
    activation = nn.PReLU(6)
    model = net(in_order, signs(), norm(), activation, ChannelBias(6), signs())
    activation.weight.data.abs_()
    return model


def in_order(model: Net, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x)
    return x


def two_thresholds(model: Net, x: Tensor) -> Tensor:
    first, second, one, other = model.layers
    result: Tensor = one(first(x)) + other(second(x)) + x
    return result


def threshold_of_a_sum(model: Net, x: Tensor) -> Tensor:
    pool, threshold, conv = model.layers
    total = x + pool(x)
    result: Tensor = conv(threshold(total)) * total.mean((2, 3), keepdim=True).sigmoid()
    return result + total


def threshold_of_a_pool(model: Net, x: Tensor) -> Tensor:
    pool, threshold, conv = model.layers
    x = pool(x)
    result: Tensor = conv(threshold(x)) + x
    return result


def scaled_floats(model: Net, x: Tensor) -> Tensor:
    (activation,) = model.layers
    result: Tensor = activation(x * x.mean((2, 3)).sigmoid()[:, :, None, None]) + x
    return result


def joined(model: Net, x: Tensor) -> Tensor:
    conv, last = model.layers
    result: Tensor = last(torch.cat((x, conv(x), x.relu()), 1))
    return result


def added_in_place(model: Net, x: Tensor) -> Tensor:
    (bias,) = model.layers
    y = bias(x)
    y += x
    return y.relu_() + y


def changed_under_another_name(model: Net, x: Tensor) -> Tensor:
    y = model.layers[0](x)
    y.flatten(1).relu_()
    result: Tensor = y + x
    return result


def tied() -> nn.Module:
    """Return a network of two binary convolutions that share their weights."""
    first, second = signs(6), signs(6)
    second.weight = first.weight
    return net(in_order, first, norm(), second)


def unused() -> nn.Module:
    """Return a network that computes something for nothing behind its result."""

    def body(model: Net, x: Tensor) -> Tensor:
        logits = x.mean((2, 3))
        model.layers[0](logits)
        return logits

    return net(body, norm())


LOWERED: dict[str, tuple[Callable[[], nn.Module], dict[Kind, int]]] = {
    "all steps": (lambda: net(in_order, nn.ReLU(), norm(), ChannelBias(6), nn.PReLU(6), ChannelBias(6)), {}),
    "too many steps": (lambda: net(in_order, nn.PReLU(6), norm(), nn.PReLU(6), nn.ReLU(), norm()), {Kind.AFFINE: 2}),
    "one slope": (lambda: net(in_order, nn.PReLU()), {}),
    "relu before a norm of sums": (
        lambda: net(in_order, signs(), nn.ReLU(), norm(), signs()),
        {Kind.SIGN: 0, Kind.AFFINE: 0},
    ),
    "rising steps before signs": (rising, {Kind.SIGN: 0, Kind.AFFINE: 0}),
    "falling steps before signs": (
        lambda: net(in_order, signs(), nn.PReLU(6), signs()),
        {Kind.SIGN: 0, Kind.AFFINE: 0},
    ),
    "maximum of sums before signs": (
        lambda: net(in_order, signs(), nn.MaxPool2d(2), nn.ReLU(), norm(), ChannelBias(6), signs()),
        {Kind.THRESHOLD: 1, Kind.AFFINE: 0},
    ),
    "two thresholds": (
        lambda: net(two_thresholds, ChannelBias(6), ChannelBias(6), signs(), signs()),
        {Kind.SIGN: 1, Kind.AFFINE: 0},
    ),
    "threshold of a sum": (
        lambda: net(threshold_of_a_sum, nn.MaxPool2d(3, 1, 1), ChannelBias(6), signs()),
        {Kind.SIGN: 0, Kind.SCALE: 1},
    ),
    "threshold of a pool": (
        lambda: net(threshold_of_a_pool, nn.MaxPool2d(3, 2), ChannelBias(6), signs()),
        {Kind.SIGN: 0, Kind.AFFINE: 0},
    ),
    "image added to a maximum of sums": (
        lambda: net(lambda model, x: in_order(model, x) + x, signs(), nn.MaxPool2d(3, 1, 1), norm()),
        {Kind.AFFINE: 1, Kind.ADD: 0},
    ),
    "padding with ones": (lambda: net(in_order, signs(70, 1, 2)), {Kind.BINARY_CONV: 1}),
    "padding that a mean counts": (lambda: net(in_order, nn.AvgPool2d(3, 2, 1)), {Kind.AVG_POOL: 1}),
    "padding that a mean does not count": (
        lambda: net(in_order, nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        {Kind.AVG_POOL: 1},
    ),
    "padding before a mean": (
        lambda: net(lambda _, x: F.avg_pool2d(F.pad(x, (0, 1, 1, 0)), 3, 2, 1)),
        {Kind.AVG_POOL: 1},
    ),
    "mean of sums": (lambda: net(in_order, signs(), nn.AvgPool2d(2)), {Kind.AFFINE: 0}),
    "depthwise": (
        lambda: net(in_order, nn.Conv2d(6, 6, (3, 2), 2, 1, groups=6, bias=False), norm(), nn.ReLU()),
        {Kind.DEPTHWISE: 1, Kind.AFFINE: 0},
    ),
    "depthwise with a bias": (
        lambda: net(in_order, nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), norm()),
        {Kind.DEPTHWISE: 1, Kind.AFFINE: 1},
    ),
    "depthwise of sums": (lambda: net(in_order, signs(), SameDepthwiseConv2d(6, 3, 2)), {Kind.DEPTHWISE: 1}),
    "scaled floats": (lambda: net(scaled_floats, nn.PReLU(6)), {Kind.SCALE: 1, Kind.SIGMOID: 1}),
    "joined channels": (lambda: net(joined, signs(5), nn.PReLU(17)), {Kind.CONCAT: 2}),
    "computed weights": (
        lambda: net(lambda model, x: F.conv2d(x, model.filters * model.scalar + 0.1) * model.scalar),
        {Kind.CONV: 2, Kind.AFFINE: 0},
    ),
    "unused": (unused, {Kind.MEAN: 1, Kind.AFFINE: 0}),
    "shared weights": (tied, {Kind.BINARY_CONV: 2}),
    "in place": (lambda: net(added_in_place, ChannelBias(6)), {}),
    "flattened": (lambda: net(in_order, nn.Flatten(), nn.PReLU(), nn.Linear(6 * 10 * 10, 4)), {}),
}


def kinds_of(program: Program) -> Counter[Kind]:
    return Counter(operation.kind for operation in program.operations)


@pytest.mark.parametrize("name", LOWERED)
def test_lowered(name: str) -> None:
    make, counts = LOWERED[name]
    torch.manual_seed(0)
    model = make()
    images = random_images(2, SIZE)
    expected = expected_logits(model, images)
    program = lowered(model, SIZE)
    assert np.abs(expected).max() > 1e-3
    for kind, count in counts.items():
        assert kinds_of(program)[kind] == count, kind
    for path in PATHS:
        runner = packed(program, path)
        assert np.abs(runner(images) - expected).max() <= 1e-5 * np.abs(expected).max()
        if kinds_of(program)[Kind.BINARY_CONV]:
            for found, wanted in zip(
                packed_sums(program, runner, images[0]), expected_sums(model, images[0]), strict=True
            ):
                np.testing.assert_array_equal(found, wanted)


def test_a_block_of_a_reactnet_is_one_operation() -> None:
    program = lowered(network("reactnet_small", width=8), 32)
    kinds = kinds_of(program)
    assert not set(kinds) & {Kind.AFFINE, Kind.ADD, Kind.SIGN}
    for operation in program.operations:
        if operation.kind is Kind.BINARY_CONV and operation.other is not None:
            assert all(
                each is not None
                for each in (operation.factor, operation.offset, operation.shift, operation.slope, operation.after)
            )


@pytest.mark.parametrize(("name", "kind"), [("quicknet", Kind.BINARY_CONV), ("reactnet_small", Kind.BINARY_CONV)])
def test_operator_of_packed_bits(name: str, kind: Kind) -> None:
    """On channels_last images the trainer's own operator convolves."""
    options = {"depths": (1, 1)} if name == "quicknet" else {}
    model = network(name, width=12, **options)
    expected = lowered(model, 40)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        exported = torch.export.export(model, (torch.zeros(1, 3, 40, 40),))
    assert "binary_conv2d" in str(exported.graph)
    found = lowered(model, 40)
    assert kinds_of(found) == kinds_of(expected)
    assert [o.flags for o in found.operations] == [o.flags for o in expected.operations]
    assert (Flag.PAD_ONES in Flag(sum({int(o.flags) for o in found.operations if o.kind is kind}))) == (
        name == "quicknet"
    )
    images = random_images(2, 40)
    np.testing.assert_array_equal(packed(found)(images), packed(expected)(images))


def bare_sign(model: Net, x: Tensor) -> Tensor:
    return x.sgn()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two names": (
        lambda: net(changed_under_another_name, ChannelBias(6)),
        "it changes a tensor in place that it reads under another name: aten.relu_.default",
    ),
    "ones": (
        lambda: net(lambda model, x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=1), model.filters)),
        "it pads something else than signs with ones",
    ),
    "ones of a depthwise convolution": (
        lambda: net(lambda model, x: model.layers[0](F.pad(x, (1, 1, 1, 1), value=1)), nn.Conv2d(6, 6, 3, groups=6)),
        "it pads something else than signs with ones",
    ),
    "half": (
        lambda: net(lambda model, x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=0.5), model.filters)),
        "it pads with something else than zeros or ones, or cuts",
    ),
    "cut": (
        lambda: net(lambda model, x: F.conv2d(F.pad(x, (-1, 1, 1, 1)), model.filters)),
        "it pads with something else than zeros or ones, or cuts",
    ),
    "padding before ReLU": (
        lambda: net(lambda _, x: F.pad(x, (1, 1, 1, 1)).relu()),
        "it pads before relu, not before a convolution or a mean of pixels",
    ),
    "padding before a maximum": (
        lambda: net(lambda _, x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3)),
        "it pads before max_pool2d, not before a convolution or a mean of pixels",
    ),
    "two paddings of a mean": (
        lambda: net(lambda _, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2, 1, count_include_pad=False)),
        "a mean counts some pixels outside of the image and not others",
    ),
    "divisor": (
        lambda: net(lambda _, x: F.avg_pool2d(x, 2, divisor_override=3)),
        "a mean of pixels has another divisor, or counts some pixels outside of the image",
    ),
    "padding larger than a window": (
        lambda: net(in_order, nn.Conv2d(6, 6, 3, padding=3)),
        "a window of 3x3 pixels may lie in its padding (3, 3, 3, 3)",
    ),
    "padding in words": (
        lambda: net(lambda model, x: F.conv2d(x, model.filters, padding="same")),
        "it has a convolution with the padding 'same'",
    ),
    "groups": (
        lambda: net(in_order, nn.Conv2d(6, 6, 3, groups=2)),
        "it has a grouped, dilated or unevenly strided convolution",
    ),
    "rows": (
        lambda: net(lambda _, x: torch.cat((x, x), 2)),
        "it concatenates something else than channels of images",
    ),
    "joined rows of values": (
        lambda: net(lambda model, x: model.layers[0](torch.cat((x.flatten(1), x.flatten(1)), 1)), nn.Linear(1200, 4)),
        "it concatenates something else than channels of images",
    ),
    "product": (
        lambda: net(lambda _, x: x * x.relu()),
        "it multiplies images by something else than one value per channel",
    ),
    "sum of sizes": (
        lambda: net(lambda _, x: x + x.mean((2, 3), keepdim=True)),
        "it adds images of different sizes",
    ),
    "columns": (
        lambda: net(lambda model, x: x + model.columns),
        "it has an operator whose weight of shape (10,) is not one value per channel",
    ),
    "factor of a sum": (
        lambda: net(lambda _, x: torch.add(x, x, alpha=2)),
        "it uses add in a way that programs do not have",
    ),
    "filters of an image": (
        lambda: net(lambda _, x: F.conv2d(x, x.mean((2, 3), keepdim=True))),
        "it uses conv2d in a way that programs do not have",
    ),
    "mean of moved dimensions": (
        lambda: net(lambda _, x: x.movedim(1, -1).mean((2, 3))),
        "a mean is not over all pixels",
    ),
    "sign of 0": (lambda: net(bare_sign), "it has a sign whose value at 0 is 0"),
    "sign of 0 of a sum": (lambda: net(lambda _, x: x.sgn() + x), "it has a sign whose value at 0 is 0"),
    "sign of 0 twice": (lambda: net(lambda _, x: x.sgn().sgn()), "it has a sign whose value at 0 is 0"),
    "sign as a result": (
        lambda: net(lambda _, x: (x.mean((2, 3)).sgn() + 0.1).sgn()),
        "it uses signs for something else than a convolution: its result",
    ),
    "norm of signs": (
        lambda: net(lambda model, x: model.layers[0](ste_sign(x)), norm()),
        "it uses signs for something else than a convolution: batch_norm",
    ),
    "operator": (lambda: net(lambda _, x: x.tanh()), "it uses tanh, which programs do not have"),
    "dimensions": (lambda: net(lambda _, x: x.movedim(2, 3)), "it moves dimensions of images"),
    "new dimension": (
        lambda: net(lambda _, x: x.mean((2, 3)).unsqueeze(1)),
        "it uses unsqueeze, which programs do not have",
    ),
    "constant": (
        lambda: net(lambda _, x: x + torch.ones(1)),
        "it uses ones, which programs do not have",
    ),
    "mean of channels": (lambda: net(lambda _, x: x.mean((1, 2))), "a mean is not over all pixels"),
    "statistics": (
        lambda: net(in_order, nn.BatchNorm2d(6, track_running_stats=False)),
        "a batch normalization has no running statistics",
    ),
    "columns of a linear layer": (
        lambda: net(in_order, nn.Linear(10, 10)),
        "it has a linear layer of columns of an image",
    ),
    "some dimensions": (
        lambda: net(lambda _, x: x.flatten(1, 2)),
        "it flattens some of an image's dimensions",
    ),
    "image": (lambda: net(lambda _, x: x.flatten(1)), "its result is not a row of logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=f"^the network cannot be exported: {re.escape(sentence)}$"):
        lowered(make(), SIZE)
