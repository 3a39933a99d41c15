from typing import Any

import pytest
import timm
import torch
from torch import nn

from bitfleet.models import (
    BiRealNet,
    ChannelLayerNorm,
    ModelConfig,
    ModelSize,
    XNORNet,
    check_images,
    count,
    create_model,
    hardtanh_tanh_sign,
)

SIZES = {
    "birealnet18": ModelSize(11_689_512, 10_985_472, 9_600, 1_676_279_808, 137_793_536),
    "birealnet34": ModelSize(21_797_672, 21_086_208, 17_024, 3_525_967_872, 137_793_536),
    "xnornet": ModelSize(62_387_104, 58_236_928, 19_328, 1_025_744_896, 113_379_328),
    "reactnet18": ModelSize(11_704_424, 10_985_472, 9_600, 1_676_279_808, 137_793_536),
    "reactnet_a": ModelSize(29_343_592, 28_253_184, 21_888, 4_816_896_000, 11_862_016),
    "quicknet_small": ModelSize(12_652_504, 11_980_800, 8_672, 1_156_055_040, 15_941_120),
    "quicknet": ModelSize(13_230_024, 12_533_760, 9_664, 1_849_688_064, 29_651_712),
    "real_to_binary": ModelSize(11_986_920, 10_985_472, 8_704, 1_676_279_808, 138_087_936),
    "binary_resnet_e18": ModelSize(11_689_640, 10_985_472, 9_728, 1_676_279_808, 137_793_536),
    "binary_alexnet": ModelSize(61_838_248, 61_827_776, 20_944, 768_512_000, 72_855_552),
    "quicknet_large": ModelSize(23_338_184, 22_634_496, 17_088, 3_699_376_128, 29_651_712),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count(model, (3, 224, 224)) == SIZES[name]
    assert model.training


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, ModelSize(10_355_850, 10_352_000, 7_700, 510_961_664, 3_110_400)),
        ({"width": 32}, ModelSize(650_538, 649_568, 1_940, 31_937_024, 777_600)),
        ({"width": 32, "norm": "layer"}, ModelSize(651_508, 649_568, 0, 31_937_024, 777_600)),
    ],
)
def test_binarynet_has_any_width(options: dict[str, Any], size: ModelSize) -> None:
    with torch.device("meta"):
        model = timm.create_model("binarynet", **options)
    assert count(model, (3, 32, 32)) == size
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)
    with pytest.raises(ValueError, match="width is 0"):
        timm.create_model("binarynet", **options | {"width": 0})


def test_published_sizes_layer_by_layer() -> None:
    with torch.device("meta"):
        xnornet, birealnet18 = XNORNet(), BiRealNet()
    per_layer = [p.numel() for p in xnornet.parameters() if getattr(p, "binary", False)]
    assert per_layer == [614_400, 884_736, 1_327_104, 884_736, 37_748_736, 16_777_216]
    per_layer = [p.numel() for p in birealnet18.parameters() if getattr(p, "binary", False)]
    first, others = (36_864, 73_728, 294_912, 1_179_648), (36_864, 147_456, 589_824, 2_359_296)
    assert per_layer == [size for a, b in zip(first, others, strict=True) for size in (a, b, b, b)]


def test_birealnet34_has_the_depths_of_resnet34() -> None:
    with torch.device("meta"):
        model = timm.create_model("birealnet34")
    assert sum(getattr(p, "binary", False) for p in model.parameters()) == 32


@pytest.mark.parametrize("side", [28, 32])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_birealnet_small(side: int, norm: str) -> None:
    model = timm.create_model("birealnet_small", norm=norm, in_chans=1)
    assert sum(p.numel() for p in model.parameters() if getattr(p, "binary", False)) == 73_728
    logits = model(torch.randn(4, 1, side, side))
    assert logits.shape == (4, 10)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_single_residual_has_the_parameters_of_the_double_one() -> None:
    with torch.device("meta"):
        model = timm.create_model("birealnet18", residual="single")
    assert count(model, (3, 224, 224)) == SIZES["birealnet18"]
    assert len(model.blocks) == 8


def test_a_single_residual_jumps_over_two_convolutions() -> None:
    double, single = (
        BiRealNet(width=8, depths=(2, 2), stem="small", residual=kind).eval() for kind in ("double", "single")
    )
    single.load_state_dict(
        dict(zip(single.state_dict(), double.state_dict().values(), strict=True))  # the same layers in the same order
    )
    x = torch.randn(2, 3, 16, 16)
    features = double.stem(x)
    for first, second in zip(double.blocks[::2], double.blocks[1::2], strict=True):
        middle = first.norm(first.conv(features))
        features = second.norm(second.conv(middle)) + first.shortcut(features)
    assert torch.equal(single(x), double.head(features.mean((2, 3))))
    assert not torch.equal(single(x), double(x))


def test_no_normalization() -> None:
    model = timm.create_model("birealnet_small", norm="none")
    assert not list(model.buffers())
    assert model.get_parameter("blocks.2.norm.weight").detach().tolist() == pytest.approx([(9 * 16) ** -0.5] * 32)
    features = model.blocks(model.stem(torch.randn(8, 3, 32, 32)))
    assert 0.1 < float(features.detach().std()) < 10  # without the statistics nothing grows with the fan-in
    with pytest.raises(ValueError, match="'none'.*batch.*layer"):
        timm.create_model("binarynet", norm="none")


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("birealnet_small", "approx"),
        ("xnornet", "ste"),
        ("binarynet", "ste"),
        ("reactnet_small", "approx"),
        ("reactnet_a", "approx"),
        ("quicknet_small", "wide_ste"),
        ("real_to_binary", "ste"),
        ("binary_resnet_e18", "wide_ste"),
        ("binary_alexnet", "ste"),
    ],
)
def test_binarizers(name: str, default: str) -> None:
    def quantizers(**options: str) -> list[object]:
        with torch.device("meta"):
            model = timm.create_model(name, **options)
        return [module.input_quantizer for module in model.modules() if hasattr(module, "input_quantizer")]

    assert quantizers(binarizer=default) == quantizers()
    assert set(quantizers(binarizer="hardtanh_tanh")) - {None} == {hardtanh_tanh_sign}


@pytest.mark.parametrize(("name", "side"), [("birealnet18", 64), ("xnornet", 224), ("binarynet", 32)])
def test_layer_norm_variants(name: str, side: int) -> None:
    model = timm.create_model(name, num_classes=7, norm="layer")
    assert any(isinstance(module, ChannelLayerNorm) for module in model.modules())
    assert not list(model.buffers())
    assert model.eval()(torch.randn(1, 3, side, side)).shape == (1, 7)


def test_layers_and_classes_are_options() -> None:
    model = BiRealNet(width=8, depths=(1, 2), stem="small", num_classes=3, in_chans=2)
    assert model(torch.randn(2, 2, 15, 15)).shape == (2, 3)
    assert model.num_classes == 3


def test_initialization() -> None:
    model = timm.create_model("birealnet_small")
    assert isinstance(model.head, nn.Linear)
    assert not model.head.bias.any()
    assert float(model.head.weight.detach().abs().max()) <= (6 / (64 + 10)) ** 0.5


@pytest.mark.parametrize("name", [*SIZES, "birealnet_small", "reactnet_small", "binarynet"])
def test_no_pretrained_weights(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: pretrained=True"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "group"}, "norm .*'group'.*batch.*layer.*none"),
        ({"stem": "tiny"}, "stem .*'tiny'"),
        ({"binarizer": "tanh"}, "binarizer .*'tanh'.*hardtanh_tanh"),
        ({"residual": "triple"}, "residual .*'triple'"),
        ({"residual": "single", "depths": (2, 3)}, r"depths .*\(2, 3\).*even"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("birealnet_small", **options)


@pytest.mark.parametrize(("name", "side", "expected"), [("xnornet", 160, "224x224"), ("binarynet", 48, "32x32")])
def test_wrong_image_size(name: str, side: int, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{side}x{side}.*{expected}"):
        timm.create_model(name)(torch.randn(1, 3, side, side))


def test_count_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("birealnet_small")
    model.blocks.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    size = count(model, (3, 32, 32))
    assert model.training
    assert not model.blocks.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not any(module._forward_hooks for module in model.modules())
    assert "73,728 of them 1-bit" in str(size)


def test_model_of_a_config() -> None:
    model = create_model(ModelConfig(name="birealnet_small", num_classes=7, norm="layer"))
    assert isinstance(model, BiRealNet)
    assert model.num_classes == 7
    assert any(isinstance(module, ChannelLayerNorm) for module in model.modules())
    assert list(create_model(ModelConfig(name="birealnet_small", num_classes=7)).buffers())
    switched = ModelConfig(name="birealnet_small", num_classes=7, binarizer="ste", residual="single")
    assert len(create_model(switched).blocks) == 3  # type: ignore[arg-type]


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="'birealnet_smal'.*birealnet_small"):
        create_model(ModelConfig(name="birealnet_smal", num_classes=10))


def test_option_of_another_model() -> None:
    with pytest.raises(ValueError, match="xnornet .*depths"):
        create_model(ModelConfig(name="xnornet", depths=(1, 1)))
    with pytest.raises(ValueError, match="xnornet .*residual"):
        create_model(ModelConfig(name="xnornet", residual="single"))
    with pytest.raises(ValueError, match="resnet18 .*binarizer"):
        create_model(ModelConfig(name="resnet18", binarizer="ste"))
    with pytest.raises(ValueError, match="regnety_002 .*binarizer"):  # whose signature does not say
        create_model(ModelConfig(name="regnety_002", binarizer="ste"))


def test_options_of_another_model_say_how_to_unset_them() -> None:
    with pytest.raises(ValueError, match="--model.width None --model.depths None$"):
        create_model(ModelConfig(name="xnornet", norm="layer", width=8, depths=(1, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "model.width .*at least 1.* 0"),
        ({"width": -4}, "model.width .*at least 1.* -4"),
        ({"depths": ()}, r"model.depths .*at least 1.* \(\)"),
        ({"depths": (2, 0)}, r"model.depths .*at least 1.* \(2, 0\)"),
        ({"depths": (-2, 2)}, r"model.depths .*at least 1.* \(-2, 2\)"),
    ],
)
def test_sizes_that_make_no_network(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(name="birealnet_small", **options)
    with pytest.raises(ValueError, match="at least 1"):
        BiRealNet(stem="small", **options)


@pytest.mark.parametrize(
    ("name", "options", "image_size", "batch_size", "message"),
    [
        ("binarynet", {}, 32, 1, "batch normalization of binarynet .* 1 image"),
        ("xnornet", {}, 224, 1, "batch normalization of xnornet"),
        ("birealnet_small", {"depths": (1, 1, 1, 1, 1)}, 28, 1, "batch normalization of birealnet_small"),
        ("xnornet", {}, 32, 8, "xnornet .*32x32.*too small"),
        ("binarynet", {}, 48, 8, "binarynet .*48x48.*32x32"),
        ("vit_tiny_patch16_224", {}, 32, 8, "vit_tiny_patch16_224 .*32x32.*224"),
    ],
)
def test_images_that_a_network_cannot_train_on(
    name: str, options: dict[str, Any], image_size: int, batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_images(ModelConfig(name=name, num_classes=10, **options), image_size, batch_size)


@pytest.mark.parametrize(
    ("name", "norm", "image_size", "batch_size"),
    [
        ("binarynet", "layer", 32, 1),
        ("binarynet", "batch", 32, 2),
        ("birealnet_small", "batch", 28, 1),
        ("resnet18", None, 64, 2),
    ],
)
def test_images_that_it_can_train_on(name: str, norm: Any, image_size: int, batch_size: int) -> None:
    before = torch.get_rng_state()
    check_images(ModelConfig(name=name, num_classes=10, norm=norm), image_size, batch_size)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn on the CPU


def test_wrong_number_of_classes() -> None:
    with pytest.raises(ValueError, match="model.num_classes .* 0"):
        ModelConfig(name="binarynet", num_classes=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reactnet18", {"width": 0}, "width is 0"),
        ("reactnet18", {"depths": (2, 0)}, r"depths are \(2, 0\)"),
        ("reactnet18", {"stem": "tiny"}, "stem is 'tiny'"),
        ("reactnet_a", {"width": 0}, "width is 0"),
        ("quicknet", {"width": 6}, "width is 6; expected a multiple of 4"),
        ("quicknet", {"depths": (1, 1, 1, 1, 1)}, r"depths are .* 1 to 4 numbers"),
        ("real_to_binary", {"width": 4}, "width is 4"),
        ("binary_resnet_e18", {"depths": ()}, r"depths are \(\)"),
        ("binary_resnet_e18", {"stem": "tiny"}, "stem is 'tiny'"),
    ],
)
def test_sizes_that_make_no_other_network(name: str, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        timm.create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("reactnet_small", {}, 28),
        ("reactnet18", {"width": 8}, 96),
        ("reactnet_a", {"width": 4}, 72),
        ("quicknet_small", {"width": 4}, 65),
        ("real_to_binary", {"width": 8}, 60),
        ("binary_resnet_e18", {"width": 8, "stem": "small"}, 32),
    ],
)
def test_other_sizes_and_classes(name: str, options: dict[str, Any], side: int) -> None:
    """Every parameter has a gradient at sizes that are not powers of 2 as well."""
    model = timm.create_model(name, num_classes=5, in_chans=2, **options)
    logits = model(torch.randn(2, 2, side, side))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_doubled_shortcut_repeats_the_channels() -> None:
    """A block of ReActNet-A with twice the channels is two with the halves of its 1x1 filters."""
    torch.manual_seed(0)
    block = timm.create_model("reactnet_a", width=4, num_classes=3).eval().blocks[0]
    x = torch.randn(2, 4, 6, 6)
    middle = block.spatial_activation(block.spatial(x) + x)
    sums = block.pointwise.norm(block.pointwise.conv(block.pointwise.threshold(middle)))
    halves = [half + middle for half in sums.split(4, dim=1)]
    assert torch.equal(block(x), block.pointwise_activation(torch.cat(halves, 1)))
