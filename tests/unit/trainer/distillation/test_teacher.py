from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from bitfleet.trainer.distillation.config import DistillConfig
from bitfleet.trainer.distillation.teacher import Teacher, file_sha256, load_teacher, precision_on, tensors_sha256

CPU = torch.device("cpu")
NAME = "test_resnet"


def network(num_classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(NAME, num_classes=num_classes)
    return model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    safetensors.torch.save_file(network().state_dict(), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def load(weights: Path | None, *, name: str = NAME, num_classes: int = 4, image_size: int = 32) -> Teacher:
    config = DistillConfig(teacher=name, weights=weights)
    return load_teacher(config, num_classes=num_classes, image_size=image_size, device=CPU)


def test_teacher_is_the_network_in_eval_mode(weights: Path) -> None:
    teacher, reference = load(weights), network().eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in teacher.network.state_dict().items()}
    logits = teacher(images)
    with torch.no_grad():
        assert torch.equal(logits, reference(images).half())
    assert logits.dtype == torch.float16
    assert not logits.requires_grad
    assert not any(param.requires_grad for param in teacher.network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.network.state_dict().items())
    assert teacher.weights_sha256 == file_sha256(weights)


def test_precision_follows_the_device() -> None:
    assert (precision_on(CPU), precision_on(torch.device("cuda"))) == ("fp32", "bf16")


def test_autocast_of_the_student_does_not_reach_the_teacher(weights: Path) -> None:
    teacher, images = load(weights), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = teacher(images)
    assert torch.equal(inside, teacher(images))


def test_weights_in_half_precision_load(weights: Path, tmp_path: Path) -> None:
    halved = {name: each.half() if each.is_floating_point() else each for name, each in network().state_dict().items()}
    safetensors.torch.save_file(halved, tmp_path / "half.safetensors")
    param = next(load(tmp_path / "half.safetensors").network.parameters())
    assert param.dtype == torch.float32
    assert torch.equal(param, next(network().parameters()).half().float())


def test_another_number_of_classes_is_named(weights: Path) -> None:
    with pytest.raises(ValueError, match="the teacher test_resnet tells 4 classes apart, and the run has 10"):
        load(weights, num_classes=10)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"weights of the teacher {tmp_path}/none .*No such file.*\.safetensors"):
        load(tmp_path / "none")


def test_pickle_and_damage_are_named(tmp_path: Path, weights: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"teacher\.pth .*not a safetensors file"):
        load(tmp_path / "teacher.pth")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"teacher\.safetensors .*not a safetensors file"):
        load(weights)


def test_weights_of_another_network_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"do not fit the teacher resnet18: conv1.weight is missing there and \[64"):
        load(weights, name="resnet18")
    more = network().state_dict() | {"aux.weight": torch.zeros(1)}
    safetensors.torch.save_file(more, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="do not fit the teacher test_resnet, which has no aux.weight"):
        load(tmp_path / "more.safetensors")


def test_misspelt_network_is_named() -> None:
    with pytest.raises(ValueError, match=r"no network 'resnet43' \(distill.teacher\); did you mean one of .*resnet34"):
        load(None, name="resnet43")


def test_network_that_does_not_take_the_images_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=4)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"test_vit cannot take images of 30x30 pixels \(.*divisible by patch size"):
        load(tmp_path / "vit.safetensors", name="test_vit", image_size=30)


def test_hub_without_network_or_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, *, pretrained: bool) -> nn.Module:
        assert pretrained
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"no weights for the teacher test_resnet \(no route to host\).*--distill"):
        load(None)


def test_hub_weights_are_known_by_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    published = network()
    state = published.state_dict()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: published)
    assert load(None).weights_sha256 == tensors_sha256(state)
    with pytest.raises(ValueError, match="test_resnet tells 4 classes apart, and the run has 5"):
        load(None, num_classes=5)
    before = tensors_sha256(state)
    next(iter(state.values())).view(-1)[0] += 1e-3
    assert load(None).weights_sha256 == tensors_sha256(state) != before
