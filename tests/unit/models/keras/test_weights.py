"""Files of Keras: which variable goes where, and the sentence for each file that does not fit."""

import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from bitfleet.models import BiRealNet, kernel_from_keras, load_keras_weights
from bitfleet.models.layers.real_layers import Norm
from tests.golden.keras_layout import Variables, flat, write_arrays, write_h5, write_npz

# Two blocks, the second with its own shortcut, in the order of Keras' model.layers.
SHAPES = {
    "conv2d": (3, 3, 3, 4),
    "batch_normalization": (4,),
    "max_pooling2d": (),
    "quant_conv2d": (3, 3, 4, 4),
    "batch_normalization_1": (4,),
    "quant_conv2d_1": (3, 3, 4, 8),
    "conv2d_1": (1, 1, 4, 8),
    "batch_normalization_3": (8,),
    "batch_normalization_2": (8,),
    "dense": (8, 5),
}
# What the layer is in the network.
MODULES = {
    "conv2d": "stem.0",
    "batch_normalization": "stem.1",
    "quant_conv2d": "blocks.0.conv",
    "batch_normalization_1": "blocks.0.norm",
    "conv2d_1": "blocks.1.shortcut.1",
    "batch_normalization_2": "blocks.1.shortcut.2",
    "quant_conv2d_1": "blocks.1.conv",
    "batch_normalization_3": "blocks.1.norm",
    "dense": "head",
}
NORM = {
    "gamma:0": "weight",
    "beta:0": "bias",
    "moving_mean:0": "running_mean",
    "moving_variance:0": "running_var",
}
Layers = dict[str, dict[str, np.ndarray]]


def network(norm: Norm = "batch") -> nn.Module:
    return BiRealNet(width=4, depths=(1, 1), stem="small", num_classes=5, norm=norm).eval()


def random_layers(norm: Norm = "batch") -> Layers:
    generator = np.random.default_rng(0)
    layers: Layers = {}
    for layer, shape in SHAPES.items():
        names = list(NORM) if len(shape) == 1 else ["kernel:0"] if shape else []
        if norm == "layer":
            layer, names = layer.replace("batch", "layer"), [name for name in names if "moving" not in name]
        layers[layer] = {name: generator.uniform(-1, 1, shape).astype(np.float32) for name in names}
        layers[layer] |= {name: np.abs(layers[layer][name]) for name in names if name == "moving_variance:0"}
    layers["dense"]["bias:0"] = generator.uniform(-1, 1, 5).astype(np.float32)
    return layers


def expected_state(layers: Layers) -> dict[str, Tensor]:
    state = {}
    for layer, module in MODULES.items():
        for name, array in layers[layer].items():
            value = kernel_from_keras(array) if name == "kernel:0" else torch.from_numpy(array)
            if layer.startswith("quant"):
                value = torch.where(value >= 0, 1.0, -1.0)
            state[f"{module}.{NORM.get(name, name.removesuffix(':0').replace('kernel', 'weight'))}"] = value
    return state


def assert_holds(model: nn.Module, layers: Layers) -> None:
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    expected = expected_state(layers)
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def write_counted_on(path: Path, layers: Variables) -> None:
    """As of a network before which the process built others."""

    def counted_on(name: str) -> str:
        match = re.fullmatch(r"(.+?)(?:_(\d+))?", name)
        assert match
        return f"{match[1]}_{int(match[2] or 0) + 7}"

    write_npz(path, {counted_on(name): found for name, found in layers.items()})


def write_without_colon(path: Path, layers: Variables) -> None:
    np.savez(path, **{name.removesuffix(":0"): array for name, array in flat(layers).items()})  # type: ignore[arg-type]


def as_dict(layers: Variables) -> Layers:
    return {layer: dict(found) for layer, found in layers.items()}


def write_nested(path: Path, models: dict[str, Layers], outer: str = "") -> None:
    """As Keras 2's `save_weights` of a chain of nested models: all variables of a model stand in
    its group.

    `outer` is a model around each of them; weights that are not trained come last, as in
    `model.weights`.
    """
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in models]
        for model, layers in models.items():
            scope = f"{outer}{model}/" if outer else ""
            found = {
                f"{scope}{layer}/{name}": array for layer, names in layers.items() for name, array in names.items()
            }
            order = sorted(found, key=lambda name: "moving" in name)
            file.create_group(model).attrs["weight_names"] = [name.encode() for name in order]
            for name in order:
                file[model][name] = found[name]


def halves(layers: Layers) -> tuple[Layers, Layers]:
    names = list(layers)
    return {name: layers[name] for name in names[:5]}, {name: layers[name] for name in names[5:]}


def write_colliding(path: Path, layers: Layers) -> None:
    """Two nested models that count their layers from 0 each, as after `clear_session`."""
    first, second = halves(layers)
    started = {"batch_normalization_2": "batch_normalization", "batch_normalization_3": "batch_normalization_1"}
    started |= {"quant_conv2d_1": "quant_conv2d", "conv2d_1": "conv2d"}
    write_nested(path, {"body": first, "tail": {started.get(name, name): found for name, found in second.items()}})


def write_by_class(path: Path, layers: Layers, prefix: str = "layers/") -> None:
    """As `save_weights("x.weights.h5")` of Keras 2.12 and later: classes are counted in the order
    of `model.layers`."""
    counts: dict[str, int] = {}
    with h5py.File(path, "w") as file:
        file["optimizer/vars/0"] = np.int64(7)
        file["metrics/mean/vars/0"] = np.float32(1)
        for layer, found in layers.items():
            kind = re.sub(r"_\d+$", "", layer)
            number = counts[kind] = counts.get(kind, -1) + 1
            for index, array in enumerate(found.values()):
                file[f"{prefix}{kind}{f'_{number}' if number else ''}/vars/{index}"] = array


def write_keras(path: Path, layers: Layers) -> None:
    """As `model.save("x.keras")`."""
    inner = path.with_suffix(".inner")
    write_by_class(inner, layers, prefix="layers/functional/layers/")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.write(inner, "model.weights.h5")


WRITERS: dict[str, Callable[[Path, Variables], None]] = {
    "named.npz": write_npz,
    "in_order.npz": write_arrays,
    "weights.h5": write_h5,
    "model.h5": lambda path, layers: write_h5(path, layers, group="model_weights", chunks=3),
    "counted_on.npz": write_counted_on,
    "reversed.npz": lambda path, layers: write_npz(path, dict(reversed(list(layers.items())))),
    "no_colon.npz": write_without_colon,
    "nested.h5": lambda path, layers: write_nested(path, {"birealnet": as_dict(layers)}),
    "in_two.h5": lambda path, layers: write_nested(path, dict(zip("ab", halves(as_dict(layers)), strict=True))),
    "deeper.hdf5": lambda path, layers: write_nested(path, {"birealnet": as_dict(layers)}, outer="outer/"),
    "colliding.h5": lambda path, layers: write_colliding(path, as_dict(layers)),
    "by_class.weights.h5": lambda path, layers: write_by_class(path, as_dict(layers)),
    "model.keras": lambda path, layers: write_keras(path, as_dict(layers)),
}


@pytest.mark.parametrize("file", WRITERS)
def test_every_variable_finds_its_place(file: str, tmp_path: Path) -> None:
    layers, model = random_layers(), network()
    WRITERS[file](tmp_path / file, layers)
    load_keras_weights(model, tmp_path / file)
    assert_holds(model, layers)
    assert sum(getattr(p, "binary", False) for p in model.parameters()) == 2


def test_the_sign_of_zero_is_plus_one(tmp_path: Path) -> None:
    layers, model = random_layers(), network()
    layers["quant_conv2d"]["kernel:0"][:] = -0.0
    layers["quant_conv2d_1"]["kernel:0"] = np.full((3, 3, 4, 8), -1, np.int8)
    write_npz(tmp_path / "weights.npz", layers)
    load_keras_weights(model, tmp_path / "weights.npz")
    assert bool((model.get_parameter("blocks.0.conv.weight") == 1).all())
    assert bool((model.get_parameter("blocks.1.conv.weight") == -1).all())


@pytest.mark.parametrize("writer", [write_npz, write_arrays])
def test_no_gamma_is_a_factor_of_one(writer: Callable[[Path, Variables], None], tmp_path: Path) -> None:
    layers, model = random_layers(), network()
    without = {name: {k: v for k, v in found.items() if k != "gamma:0"} for name, found in layers.items()}
    writer(tmp_path / "weights.npz", without)
    load_keras_weights(model, tmp_path / "weights.npz")
    for found in layers.values():
        found |= {name: np.ones_like(array) for name, array in found.items() if name == "gamma:0"}
    assert_holds(model, layers)


@pytest.mark.parametrize("writer", [write_npz, write_arrays])
def test_layer_norms(writer: Callable[[Path, Variables], None], tmp_path: Path) -> None:
    layers, model = random_layers("layer"), network("layer")
    writer(tmp_path / "weights.npz", layers)
    load_keras_weights(model, tmp_path / "weights.npz")
    assert_holds(model, {name.replace("layer_norm", "batch_norm"): found for name, found in layers.items()})


def test_flatten_of_keras_is_rows_columns_channels() -> None:
    features = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)  # [H, W, C]
    kernel = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    result = kernel_from_keras(kernel, num_pixels=6) @ torch.from_numpy(features.transpose(2, 0, 1).copy()).flatten()
    np.testing.assert_allclose(result.numpy(), features.reshape(-1) @ kernel, rtol=1e-5)


def change(layer: str, name: str, array: np.ndarray | None) -> Callable[[Layers], None]:
    """Replace a variable, or drop it."""

    def edit(layers: Layers) -> None:
        if array is None:
            del layers[layer][name]
        else:
            layers.setdefault(layer, {})[name] = array

    return edit


MISMATCHES = [
    (change("quant_conv2d", "kernel:0", None), r"no quant_conv2d/kernel; BiRealNet.* with shape \(3, 3, 4, 4\)"),
    (change("batch_normalization_2", "gamma:0", None), r"no batch_normalization_2/gamma; .* with shape \(8,\)"),
    (change("batch_normalization", "moving_variance:0", None), "no batch_normalization/moving_variance"),
    (change("dense", "bias:0", None), r"no dense/bias; .* with shape \(5,\)"),
    (change("dense", "kernel:0", np.zeros((8, 9))), r"dense/kernel:0 of shape \(8, 9\).* expects .*\(8, 5\)"),
    (change("conv2d", "kernel:0", np.zeros((4, 3, 3, 3))), r"conv2d/kernel:0 of shape \(4, 3, 3, 3\).*\(3, 3, 3, 4\)"),
    (change("conv2d", "kernel:0", np.full((3, 3, 3, 4), "x")), "conv2d/kernel:0 .* and <U1; .* expects numbers"),
    (change("dense", "bias:0", np.full(5, np.nan)), "dense/bias:0 with values that are not finite"),
    (change("quant_conv2d", "kernel:0", np.full((3, 3, 4, 4), np.inf)), "kernel:0 with values that are not finite"),
    (change("batch_normalization", "moving_variance:0", -np.ones(4)), "moving_variance:0 with negative values"),
    (change("conv2d", "bias:0", np.zeros(4)), r"conv2d/bias:0 of shape \(4,\); .* expects only kernel of that layer"),
    (
        change("quant_conv2d_2", "kernel:0", np.zeros((1, 2))),
        r"quant_conv2d_2/kernel:0 .*\(1, 2\).* 2 quant_conv2d layers",
    ),
    (
        change("quant_dense", "kernel:0", np.zeros((1, 2))),
        r"quant_dense/kernel:0 .*\(1, 2\).* expects 0 quant_dense layers",
    ),
    (
        change("p_re_lu", "alpha:0", np.zeros(3)),
        r"p_re_lu/alpha:0 of shape \(3,\); BiRealNet .* expects 0 p_re_lu layers",
    ),
    (
        change("embedding", "alpha:0", np.zeros(3)),
        r"embedding/alpha:0 of shape \(3,\); expected names as quant_conv2d_1/kernel:0",
    ),
    (change("dense", "kernel", np.zeros((8, 5))), r"dense/kernel of shape \(8, 5\) twice"),
    (change("layer_normalization", "beta:0", np.zeros(4)), "expects 0 layer_normalization layers: one norm's weights"),
]


@pytest.mark.parametrize(("edit", "message"), MISMATCHES)
def test_a_mismatch_is_named_and_changes_nothing(edit: Callable[[Layers], None], message: str, tmp_path: Path) -> None:
    layers, model = random_layers(), network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edit(layers)
    write_npz(tmp_path / "weights.npz", layers)
    with pytest.raises(ValueError, match=message) as raised:
        load_keras_weights(model, tmp_path / "weights.npz")
    assert str(raised.value).startswith(f"{tmp_path / 'weights.npz'} has ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_mismatch_in_a_nested_model_is_named_as_the_file_has_it(tmp_path: Path) -> None:
    layers = random_layers()
    layers["dense"]["kernel:0"] = np.zeros((8, 9))
    write_nested(tmp_path / "weights.h5", {"birealnet": layers}, outer="outer/")
    with pytest.raises(ValueError, match=r"birealnet/outer/birealnet/dense/kernel:0 .*\(8, 9\)"):
        load_keras_weights(network(), tmp_path / "weights.h5")
    write_by_class(tmp_path / "weights.h5", layers)
    with pytest.raises(ValueError, match=r"layers/dense/vars/0 .*\(8, 9\)"):
        load_keras_weights(network(), tmp_path / "weights.h5")
    layers["conv2d_2"] = {"kernel:0": np.zeros(3)}
    write_by_class(tmp_path / "weights.h5", layers)
    with pytest.raises(ValueError, match=r"layers/conv2d_2/vars/0 .*\(3,\).* 2 conv2d layers"):
        load_keras_weights(network(), tmp_path / "weights.h5")
    layers.pop("conv2d_2")
    layers["conv2d"]["bias:0"] = np.zeros(4)
    write_by_class(tmp_path / "weights.h5", layers)
    with pytest.raises(ValueError, match=r"layers/conv2d/vars/1 .*\(4,\).* kernel "):
        load_keras_weights(network(), tmp_path / "weights.h5")


def write_layers_apart(path: Path, layers: Layers, classes: Sequence[str]) -> None:
    """Each layer in its own nested model, whose class is one of `classes` in turn."""
    counts: dict[str, int] = {}
    with h5py.File(path, "w") as file:
        for place, (layer, found) in enumerate(layers.items()):
            model = classes[place % len(classes)]
            number = counts[model] = counts.get(model, -1) + 1
            kind = re.sub(r"_\d+$", "", layer)
            for index, array in enumerate(found.values()):
                file[f"layers/{model}{f'_{number}' if number else ''}/layers/{kind}/vars/{index}"] = array


def test_nested_models_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Eleven of one class, of which HDF5 lists the tenth before the second; of two classes the
    order is not in the file."""
    layers, model = random_layers(), network()
    ordered = {"dropout": {}, **layers}
    write_layers_apart(tmp_path / "one.weights.h5", ordered, ["sequential"])
    load_keras_weights(model, tmp_path / "one.weights.h5")
    assert_holds(model, layers)
    write_layers_apart(tmp_path / "two.weights.h5", ordered, ["sequential", "functional"])
    with pytest.raises(ValueError, match=r"layers/\w+/.* and layers/\w+/.*np.savez"):
        load_keras_weights(network(), tmp_path / "two.weights.h5")


def test_binarynet_with_layer_normalization_has_factors_and_offsets(tmp_path: Path) -> None:
    """7,700 weights in full precision, as the official code's; its logits, computed here in Keras'
    layout."""
    model = timm.create_model("binarynet", norm="layer").eval()
    assert sum(p.numel() for p in model.parameters() if not getattr(p, "binary", False)) == 7700
    generator = np.random.default_rng(1)
    channels = [(128, 3), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]
    shapes = [(3, 3, inputs, outputs) for outputs, inputs in channels] + [(4608, 1024), (1024, 1024), (1024, 10)]
    kinds = [*["quant_conv2d"] * 6, *["quant_dense"] * 3]
    names = [f"{kind}_{i}" if (i := kinds[:index].count(kind)) else kind for index, kind in enumerate(kinds)]
    layers: Layers = {}
    for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        layers[name] = {"kernel:0": generator.choice([-1.0, 1.0], shape).astype(np.float32)}
        layers[f"layer_normalization_{index}" if index else "layer_normalization"] = {
            "gamma:0": generator.uniform(0.5, 1.5, shape[-1]).astype(np.float32),
            "beta:0": generator.uniform(-0.5, 0.5, shape[-1]).astype(np.float32),
        }
    write_h5(tmp_path / "weights.h5", layers)
    load_keras_weights(model, tmp_path / "weights.h5")
    images = generator.normal(size=(2, 32, 32, 3)).astype(np.float32)
    x = torch.from_numpy(images)  # [N, H, W, C]
    for index, name in enumerate(names):
        kernel = torch.from_numpy(layers[name]["kernel:0"])
        x = torch.where(x >= 0, 1.0, -1.0) if index else x
        if kernel.dim() == 4:
            x = nn.functional.conv2d(x.movedim(-1, 1), kernel.permute(3, 2, 0, 1), padding=1 if index else 0)
            x = (nn.functional.max_pool2d(x, 2) if index % 2 else x).movedim(1, -1)
        else:
            x = x.reshape(len(x), -1) @ kernel
        norm = layers[f"layer_normalization_{index}" if index else "layer_normalization"]
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
        x = x * torch.from_numpy(norm["gamma:0"]) + torch.from_numpy(norm["beta:0"])
    with torch.no_grad():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    torch.testing.assert_close(logits, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("writer", [write_npz, write_arrays])
@pytest.mark.parametrize(("file_norm", "norm"), [("batch", "layer"), ("layer", "batch")])
def test_the_other_norm(file_norm: Norm, norm: Norm, writer: Callable[[Path, Variables], None], tmp_path: Path) -> None:
    writer(tmp_path / "weights.npz", random_layers(file_norm))
    named = (
        f"has {file_norm}_normalization/gamma:0 of shape .* {norm}_normalization expects 0 {file_norm}_normalization"
    )
    count = f"arrays; BiRealNet with {norm}_normalization expects "
    with pytest.raises(ValueError, match=named if writer is write_npz else count):
        load_keras_weights(network(norm), tmp_path / "weights.npz")


def test_arrays_in_another_order(tmp_path: Path) -> None:
    layers = random_layers()
    layers["dense"] = dict(reversed(layers["dense"].items()))
    write_arrays(tmp_path / "weights.npz", layers)
    with pytest.raises(ValueError, match=r"arr_20 \(dense/kernel\) .*\(5,\).*\(8, 5\)"):
        load_keras_weights(network(), tmp_path / "weights.npz")


def test_a_gap_in_the_arrays(tmp_path: Path) -> None:
    arrays = {f"arr_{index + (index > 3)}": array for index, array in enumerate(flat(random_layers()).values())}
    np.savez(tmp_path / "weights.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no arr_4.* arr_0 to arr_21"):
        load_keras_weights(network(), tmp_path / "weights.npz")


def empty_npz(path: Path) -> None:
    np.savez(path)


def object_npz(path: Path) -> None:
    np.savez(path, arr_0=np.array([{}], dtype=object))


def truncated_npz(path: Path) -> None:
    write_npz(path, random_layers())
    path.write_bytes(path.read_bytes()[:-500])


def other_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["layers/conv2d/kernel"] = np.zeros(3)


def keras_without_weights(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


def array_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["model_weights"] = np.zeros(3)


def header_npz(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00\x0a\x00{'descr':\n")


def doubled_h5(path: Path) -> None:
    write_nested(path, {"a": {"conv2d": {"kernel:0": np.zeros(3)}}})
    with h5py.File(path, "a") as file:
        file["a"].attrs["weight_names"] = [b"a/conv2d/kernel:0", b"conv2d/kernel:0"]
        file["a/a/conv2d/kernel:0"] = np.ones(3)


def hollow_h5(path: Path) -> None:
    write_h5(path, random_layers())
    with h5py.File(path, "a") as file:
        del file["conv2d/conv2d/kernel:0"]


@pytest.mark.parametrize(
    ("file", "write", "message"),
    [
        ("weights.npz", lambda path: None, "there is no weights file"),
        ("weights.keras", lambda path: None, "there is no weights file"),
        ("weights.pb", lambda path: None, r"ends in '.pb'; expected .npz, .h5, .hdf5, .keras"),
        ("weights.keras", lambda path: path.write_bytes(b"text"), "not a weights file of Keras: .*zip"),
        ("weights.keras", keras_without_weights, "not a weights file of Keras: it holds no model.weights.h5"),
        ("weights.h5", doubled_h5, "it lists a/conv2d/kernel:0 twice"),
        ("weights.npz", lambda path: path.write_bytes(b"text"), "not an archive .*np.savez"),
        ("weights.npz", truncated_npz, "not a weights file of Keras: "),
        ("weights.npz", empty_npz, "it has no variables"),
        ("weights.npz", object_npz, "not a weights file of Keras: .*allow_pickle"),
        ("weights.h5", lambda path: path.write_bytes(b"text"), "not a weights file of Keras: .*file signature"),
        ("weights.h5", other_h5, "its group / has no attribute layer_names"),
        ("weights.h5", array_h5, "not a weights file of Keras: "),
        ("weights.npz", header_npz, "not a weights file of Keras: "),
        ("weights.h5", hollow_h5, "not a weights file of Keras: .*kernel:0"),
    ],
)
def test_no_file_of_keras(file: str, write: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write(tmp_path / file)
    with pytest.raises(ValueError, match=message) as raised:
        load_keras_weights(network(), tmp_path / file)
    assert str(tmp_path / file) in str(raised.value)


def test_unknown_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear.*BinaryNet, XNORNet, .* or BinaryAlexNet"):
        load_keras_weights(nn.Linear(1, 1), tmp_path / "weights.npz")


@pytest.mark.parametrize("options", [{"residual": "single"}, {"norm": "none"}])
def test_ablations_have_no_keras_code(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'residual="single" or norm="none"'):
        load_keras_weights(BiRealNet(width=4, depths=(2,), stem="small", **options), tmp_path / "weights.npz")


def test_scales_that_cannot_be_folded(tmp_path: Path) -> None:
    layers = random_layers()
    layers["quant_conv2d_1"]["kernel:0"][..., 6] = 0
    write_npz(tmp_path / "weights.npz", layers)
    with pytest.raises(ValueError, match=r"filter 6 of quant_conv2d_1/kernel:0 .*mean\|W\| = 0"):
        load_keras_weights(network(), tmp_path / "weights.npz", scales="larq-zoo")
    write_npz(tmp_path / "weights.npz", random_layers("layer"))
    with pytest.raises(ValueError, match="quant_conv2d/kernel:0 .* no BatchNorm"):
        load_keras_weights(network("layer"), tmp_path / "weights.npz", scales="larq-zoo")
    with pytest.raises(ValueError, match="scales .*'all'.*none.*larq-zoo"):
        load_keras_weights(network(), tmp_path / "weights.npz", scales="all")  # type: ignore[arg-type]
