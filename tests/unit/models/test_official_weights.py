"""Names of ReActNet's published code; its numbers are in tests/numerics/test_models_ladder.py."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitfleet.models import ModelConfig, ReActNet, ReActNetA, create_model
from bitfleet.models.official_weights import from_official
from bitfleet.trainer.checkpoint import load_initial_weights

NET = ModelConfig(name="reactnet18", num_classes=3, width=4, depths=(2, 1))
NET_A = ModelConfig(name="reactnet_a", num_classes=3, width=2)


def norm(name: str, channels: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.randn(channels),
        f"{name}.bias": torch.randn(channels),
        f"{name}.running_mean": torch.randn(channels),
        f"{name}.running_var": torch.rand(channels) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(9),
    }


def bias(channels: int) -> Tensor:
    return torch.randn(1, channels, 1, 1)


def resnet() -> dict[str, Tensor]:
    """Return official weights of `NET`."""
    found = {"conv1.weight": torch.randn(4, 3, 7, 7), **norm("bn1", 4)}
    for block, inputs, outputs in (("layer1.0", 4, 4), ("layer1.1", 4, 4), ("layer2.0", 4, 8)):
        found |= {
            f"{block}.move0.bias": bias(inputs),
            f"{block}.binary_conv.weight": torch.randn(outputs, inputs, 3, 3),
            **norm(f"{block}.bn1", outputs),
            f"{block}.move1.bias": bias(outputs),
            f"{block}.prelu.weight": torch.randn(outputs),
            f"{block}.move2.bias": bias(outputs),
        }
    found |= {"layer2.0.downsample.1.weight": torch.randn(8, 4, 1, 1), **norm("layer2.0.downsample.2", 8)}
    return found | {"fc.weight": torch.randn(3, 8), "fc.bias": torch.randn(3)}


def mobilenet(*, stage: int) -> dict[str, Tensor]:
    """Return weights of `NET_A`; stage 1 has kernels in four dimensions, stage 2 flat ones."""
    kernel = "weight" if stage == 1 else "weights"

    def shaped(outputs: int, inputs: int, side: int) -> Tensor:
        weight = torch.randn(outputs, inputs, side, side)
        return weight if stage == 1 else weight.reshape(-1, 1)

    channels = [2, 4, 8, 8, 16, 16, *[32] * 6, 64, 64]
    found = {"feature.0.conv1.weight": torch.randn(2, 3, 3, 3), **norm("feature.0.bn1", 2)}
    for index, (inputs, outputs) in enumerate(itertools.pairwise(channels), start=1):
        block = f"feature.{index}"
        found |= {f"{block}.move11.bias": bias(inputs), f"{block}.binary_3x3.{kernel}": shaped(inputs, inputs, 3)}
        found |= norm(f"{block}.bn1", inputs)
        if inputs == outputs:
            found |= {f"{block}.binary_pw.{kernel}": shaped(inputs, inputs, 1), **norm(f"{block}.bn2", inputs)}
        else:
            for half in (1, 2):
                found[f"{block}.binary_pw_down{half}.{kernel}"] = shaped(inputs, inputs, 1)
                found |= norm(f"{block}.bn2_{half}", inputs)
        for move, size in (("12", inputs), ("13", inputs), ("21", inputs), ("22", outputs), ("23", outputs)):
            found[f"{block}.move{move}.bias"] = bias(size)
        found |= {f"{block}.prelu1.weight": torch.randn(inputs), f"{block}.prelu2.weight": torch.randn(outputs)}
    return found | {"fc.weight": torch.randn(3, 64), "fc.bias": torch.randn(3)}


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_tensor_arrives(stage: int, suffix: str, tmp_path: Path) -> None:
    for config, tensors in ((NET, resnet()), (NET_A, mobilenet(stage=stage))):
        state = {f"module.{name}": tensor for name, tensor in tensors.items()}
        path = tmp_path / f"model{suffix}"
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({"epoch": 1, "state_dict": state}, path)
        model = create_model(config)
        load_initial_weights(model, config, path, "none", new_head=False)
        for name, tensor in from_official(model, tensors).items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_scales_go_into_the_running_statistics() -> None:
    tensors = resnet()
    found = from_official(create_model(NET), tensors)
    weight, scale = tensors["layer2.0.binary_conv.weight"], tensors["layer2.0.binary_conv.weight"].abs().mean((1, 2, 3))
    assert torch.equal(found["blocks.2.binary.conv.weight"], weight.sign())
    sums = torch.randn(5, 8, 2, 2) * 10
    ours, theirs = (
        torch.nn.functional.batch_norm(x, mean, variance, eps=1e-5)
        for x, mean, variance in (
            (sums, found["blocks.2.binary.norm.running_mean"], found["blocks.2.binary.norm.running_var"]),
            (
                sums * scale.view(-1, 1, 1),
                tensors["layer2.0.bn1.running_mean"],
                tensors["layer2.0.bn1.running_var"],
            ),
        )
    )
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(found["blocks.2.binary.norm.weight"], tensors["layer2.0.bn1.weight"])


def test_a_filter_without_a_sign_is_named() -> None:
    tensors = resnet()
    tensors["layer1.1.binary_conv.weight"][2] = 0
    with pytest.raises(ValueError, match="output filter 2 of blocks.1.binary.conv.weight is all 0"):
        from_official(ReActNet(width=4, depths=(2, 1), num_classes=3), tensors)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    for tensors, model, sentence in (
        (resnet() | {"layer1.0.extra.weight": torch.zeros(3)}, create_model(NET), "this model has no layer1.0.extra"),
        (mobilenet(stage=2) | {"feature.0.move11.bias": torch.zeros(3)}, create_model(NET_A), "no feature.0.move11"),
        (resnet(), ReActNetA(width=2, num_classes=3), r"stem.0.weight is \[4, 3, 7, 7\]"),
        (resnet() | {"fc.bias": torch.zeros(7)}, create_model(NET), r"head.bias is \[7\]"),
        (
            mobilenet(stage=1) | {"feature.2.binary_pw_down2.weight": torch.zeros(4, 3, 1, 1)},
            create_model(NET_A),
            r"blocks.1.pointwise.conv.weight is 2 tensors in the file, of shapes \[\d+, \d+, 1, 1\] and \[4, 3, 1, 1\]",
        ),
    ):
        torch.save(tensors, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=sentence):
            load_initial_weights(model, NET, tmp_path / "w.pth", "none", new_head=False)


def test_another_number_of_classes_takes_a_new_head(tmp_path: Path) -> None:
    torch.save({"state_dict": resnet()}, tmp_path / "w.pth.tar")
    config = ModelConfig(name="reactnet18", num_classes=5, width=4, depths=(2, 1))
    model = create_model(config)
    before = model.get_parameter("head.weight").detach().clone()
    load_initial_weights(model, config, tmp_path / "w.pth.tar", "none", new_head=True)
    assert torch.equal(model.get_parameter("head.weight"), before)
