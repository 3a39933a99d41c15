"""Time an exported network on one CPU core: the packed program, torch, ONNX Runtime."""

import copy
import functools
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from bitfleet.launch.bench.command import Packed
from bitfleet.launch.bench.results import Row, spread, titled
from bitfleet.launch.bench.timing import interleave, ratio, ratios, seconds_per_call
from bitfleet.models import ModelConfig, create_model
from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.real_layers import conv2d, same_padding
from bitfleet.packed.lowering import lower
from bitfleet.packed.onnx_format import PIXELS, to_onnx
from bitfleet.packed.program import Array, Kind, Operation, Program, to_bytes
from bitfleet.packed.runner import PackedNetwork
from bitfleet.trainer.data import normalize

CPU = torch.device("cpu")
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
SECONDS_PER_TURN = 0.2
REFERENCE = "torch fp32"
PACKED = "packed program"
CALIBRATION_IMAGES = 4


def bench_packed(options: Packed) -> Iterator[str]:
    """Yield a table of contenders, and one of the program's binary convolutions."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = create_model(ModelConfig(name=options.network, num_classes=1000)).eval()
    shape = (1, options.size, options.size, 3)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    program = lower(model, options.size, MEAN, STD)
    content = to_bytes(program)
    network = PackedNetwork(content, {})
    others, missing = resnet_runs(image)
    runs = network_runs(model, network, image) | others
    seconds = interleave({name: functools.partial(_turn, run) for name, run in runs.items()}, options.rounds)
    rows = [
        {
            "what": name,
            "ms": spread([1e3 * value for value in values]),
            "times faster than torch": ratio(seconds[REFERENCE], values),
        }
        for name, values in seconds.items()
    ]
    weights = 4 * sum(tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point())
    yield titled(
        f"{options.network}, {options.size} pixels, one image, {network.instructions}: {len(content):,} bytes, fp32 "
        f"{weights:,}; one thread where none is named, median of {options.rounds} rounds (quartiles)",
        rows + missing,
    )
    two = ratios(seconds[PACKED], seconds[f"{PACKED}, 2 threads"])
    yield f"2 threads are {spread(two)} times as fast as one"
    yield titled("binary convolutions of the packed program", binary_rows(program, network, image, options.rounds))


def _turn(run: Callable[[], object]) -> float:
    """Return the seconds of a call, by as many calls as a turn has time for."""
    run()
    return seconds_per_call(run, max(1, round(SECONDS_PER_TURN / max(seconds_per_call(run, 1, CPU), 1e-6))), CPU)


def network_runs(model: nn.Module, network: PackedNetwork, image: Array) -> dict[str, Callable[[], object]]:
    """Return what computes the logits of `model` for `image`; each is a contender."""
    return {
        PACKED: lambda: network(image),
        f"{PACKED}, 2 threads": lambda: network(image, 2),
        REFERENCE: _torch_run(with_float_convolutions(model), image),
        "torch, bitfleet's evaluation on bits": _torch_run(model, image),
    }


def _torch_run(model: nn.Module, image: Array) -> Callable[[], object]:
    batch = normalize(torch.from_numpy(image), MEAN, STD)

    def run() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(batch)
            return logits

    return run


def resnet_runs(image: Array) -> tuple[dict[str, Callable[[], object]], list[Row]]:
    """Return the ResNet 18 that people would use instead, and rows of what is missing."""
    resnet = timm.create_model("resnet18").eval()
    runs = {"resnet18, torch fp32": _torch_run(resnet, image)}
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        return runs, [{"what": "resnet18, ONNX Runtime", "skipped": 'pip install ".[export]"'}]
    return runs | onnx_runs(lower(resnet, image.shape[1], MEAN, STD), image), []


class _FloatConv2d(nn.Module):
    """A binary convolution by torch's float one, as without bitfleet's kernels."""

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, stride = self.layer, self.layer.stride[0]
        assert layer.input_quantizer is not None
        padding = same_padding(x, layer.kernel_size[0], stride) if layer.same else layer.margin
        return conv2d(layer.input_quantizer(x), layer.weight, stride, padding, layer.pad_value)


def with_float_convolutions(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose binary convolutions are torch's float ones."""
    result = copy.deepcopy(model)
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantConv2d) and child.input_quantizer is not None:
                setattr(parent, name, _FloatConv2d(child))
    return result


def onnx_runs(program: Program, image: Array) -> dict[str, Callable[[], object]]:
    """Return ResNet 18 in ONNX Runtime: in fp32, and in int8 calibrated on random images."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    pixels = np.ascontiguousarray(image.transpose(0, 3, 1, 2))
    generator = np.random.default_rng(1)
    batches = iter([generator.integers(0, 256, pixels.shape, dtype=np.uint8) for _ in range(CALIBRATION_IMAGES)])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Array] | None:
            batch = next(batches, None)
            return None if batch is None else {PIXELS: batch}

    def run(content: bytes) -> Callable[[], object]:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {PIXELS: pixels})

    content = to_onnx(program, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        prepared, path = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(onnx.load_from_string(content), prepared, skip_symbolic_shape=True)
        quantize_static(prepared, path, Reader())
        int8 = path.read_bytes()
    return {"resnet18, ONNX Runtime fp32": run(content), "resnet18, ONNX Runtime int8": run(int8)}


def macs_of(operation: Operation) -> int:
    """Return the multiply-adds of a convolution."""
    target = operation.target
    outputs = target.height * target.width * target.channels
    return outputs * operation.kernel[0] * operation.kernel[1] * operation.source.channels


def binary_rows(program: Program, network: PackedNetwork, image: Array, num_rounds: int) -> list[Row]:
    """Return time and rate of each kind of binary convolution; the medians of the rounds."""
    times: list[list[float]] = []
    for _ in range(1 + 10 * num_rounds):
        network(image)
        times.append(list(network.seconds()))
    seconds = [statistics.median(column) for column in zip(*times[1:], strict=True)]
    entries = [
        (f"{o.kernel[0]}x{o.kernel[1]}, {o.source.channels} channels, {o.target.height} pixels", macs_of(o), spent)
        for o, spent in zip(program.operations, seconds, strict=True)
        if o.kind is Kind.BINARY_CONV
    ]
    names = list(dict.fromkeys(name for name, _, _ in entries))
    groups = {name: [(macs, spent) for other, macs, spent in entries if other == name] for name in names}
    if entries:
        groups["all"] = [(macs, spent) for _, macs, spent in entries]
    rows: list[Row] = []
    for name, parts in groups.items():
        macs, spent = (sum(column) for column in zip(*parts, strict=True))
        rows.append({"what": name, "convolutions": len(parts), "ms": 1e3 * spent, "TMAC/s": macs / spent / 1e12})
    rows.append({"what": "all operations", "convolutions": len(seconds), "ms": 1e3 * sum(seconds), "TMAC/s": None})
    return rows
