import warnings
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitfleet.models import ModelConfig, compilation, compile_network, create_model
from bitfleet.models.compilation import problem_of_compiling
from bitfleet.models.layers import layers

SMALL = [
    ModelConfig(name="birealnet_small", num_classes=10, norm=norm, binarizer=binarizer)
    for norm in ("batch", "layer", "none")
    for binarizer in ("ste", "wide_ste", "approx", "hardtanh_tanh")
]
OTHERS = [
    ModelConfig(name="reactnet_small", num_classes=10),
    ModelConfig(name="reactnet_a", num_classes=10, width=8),
    ModelConfig(name="real_to_binary", num_classes=10, width=8),
    ModelConfig(name="binary_resnet_e18", num_classes=10, width=8),
    ModelConfig(name="quicknet_small", num_classes=10, width=8, depths=(1, 1, 2, 1)),
]
XNORNET = ModelConfig(name="xnornet", num_classes=10)
NETWORKS = [
    *SMALL,
    ModelConfig(name="birealnet_small", num_classes=10, residual="single"),
    ModelConfig(name="binarynet", num_classes=10),
    ModelConfig(name="binarynet", num_classes=10, norm="layer", binarizer="approx"),
    XNORNET,
    ModelConfig(name="xnornet", num_classes=10, norm="layer", binarizer="hardtanh_tanh"),
    ModelConfig(name="birealnet18", num_classes=10),
    ModelConfig(name="birealnet34", num_classes=10),
    ModelConfig(name="binary_alexnet", num_classes=10),
    *OTHERS,
]
SIDES = {
    "xnornet": 224,
    "binary_alexnet": 224,
    "real_to_binary": 64,
    "binary_resnet_e18": 64,
    "birealnet18": 64,
    "birealnet34": 64,
    "reactnet_a": 64,
    "quicknet_small": 64,
}


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    """Drop compiled code between tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and buffers after one forward and backward pass."""
    logits = model(images)
    F.cross_entropy(logits.float(), torch.arange(len(images))).backward()
    found = {"logits": logits.detach()} | {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        found[f"gradient of {name}"] = param.grad
    return found


def name_of(config: object) -> str:
    return (
        f"{config.name} {config.norm} {config.binarizer} {config.residual}" if isinstance(config, ModelConfig) else ""
    )


@pytest.mark.parametrize("config", NETWORKS, ids=name_of)
def test_one_graph_with_the_gradients_of_eager(config: ModelConfig) -> None:
    check_one_graph(config)


@pytest.mark.parametrize("config", [*SMALL[:3], XNORNET, *OTHERS], ids=name_of)
def test_one_graph_of_float_convolutions(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(layers, "can_pack", lambda *_: False)
    check_one_graph(config)


def check_one_graph(config: ModelConfig) -> None:
    """Run what torch.compile captures by eager operators: any graph break is an error, any other
    result as well."""
    torch.manual_seed(0)
    eager, compiled = create_model(config), create_model(config)
    compiled.load_state_dict(eager.state_dict())
    side = SIDES.get(config.name, 32)
    images = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    expected = trained(eager, images)
    compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    found = trained(compiled, images)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_names_and_state_stay_as_they_are() -> None:
    model = create_model(ModelConfig(name="birealnet_small", num_classes=10))
    names = list(model.state_dict())
    compile_network(model)
    assert list(model.state_dict()) == names
    assert type(model).__name__ == "BiRealNet"


class Counting:
    """A compiler that runs what it gets and counts the graphs."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        self.num_graphs += 1
        return graph


def test_steps_compile_once_and_eager_evaluation_never(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setattr(torch._inductor, "compile", counting)
    model = create_model(ModelConfig(name="birealnet_small", num_classes=10))
    compile_network(model)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(len(calls)))  # as DeepSpeed's engine, whose hooks count steps
    for _ in range(3):
        model.train()
        F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        model.eval()
        for batch_size in (4, 3):
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                model(torch.randn(batch_size, 3, 32, 32))
    assert counting.num_graphs == 1
    assert calls == list(range(9))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch's own look at what lies between two graphs
def test_a_network_of_timm_may_break_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setattr(torch._inductor, "compile", counting)

    class Breaking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x * 2

    model = timm.create_model("test_resnet", num_classes=10)
    model.conv1 = nn.Sequential(Breaking(), model.conv1)
    compile_network(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert counting.num_graphs >= 1


def test_what_does_not_compile_runs_eagerly_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("\nno compiler at all\nsecond line")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    torch.manual_seed(0)
    model = create_model(ModelConfig(name="birealnet_small", num_classes=10))
    images = torch.randn(4, 3, 32, 32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = trained(model, images)
    model.load_state_dict(state)
    model.zero_grad()
    compile_network(model)
    with pytest.warns(RuntimeWarning, match="eager.* RuntimeError: no compiler at all$"):
        found = trained(model, images)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, images)


def test_why_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(*_: object, **__: object) -> object:
        def fail(_: Tensor) -> None:
            raise OSError("g++ not found")

        return fail

    monkeypatch.setattr(compilation.torch, "compile", compile_)
    assert problem_of_compiling(torch.device("cpu")) == "OSError: g++ not found"
