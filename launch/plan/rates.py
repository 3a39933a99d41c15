"""Speeds of a machine's parts: published figures, or a file that `bitfleet bench plan` measured."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pydantic

from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.strict_json import to_json

FLOP_PER_MAC, FLOP_PER_FORWARD_MAC = 6, 2
"""Forward 2 (multiply and add), backward twice that."""
PHOTO_SIZE = 224
"""Side, in pixels, of the images that the published decoders make."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Speeds of one device: a GPU, or a core of a machine without any, whose cores the ranks of a
    node share.

    Every number is positive.
    """

    name: str
    device: Literal["gpu", "cpu"]
    """gpu: one per rank, and data, compute and launches overlap. cpu: all of it is work for the
    same cores."""
    cores: float
    """CPU cores per node, unless the command line says otherwise."""
    flops_per_second: float
    """Forward and backward together, FLOP_PER_MAC per multiply-accumulate."""
    launch_seconds: float
    """Time of the host per kernel: Python, autograd, torch's dispatcher, the driver."""
    node_seconds: float
    """Time of a GPU between two kernels of a graph."""
    whole_ns: float
    """Nanoseconds per weight of the network and step: gradient into its bucket, sum, signs back
    into the weights."""
    update_ns: float
    """Nanoseconds per weight of a rank's slice: the rule."""
    plain_update_ns: float
    """The same for the eager rule, which DeepSpeed's sharding runs (sharding none, zero1,
    zero2)."""
    decode_seconds: float
    """Time per image to decode, crop and resize it on the device: the GPU's, or the core's."""
    core_decode_seconds: float
    """The same on a core of a GPU machine."""
    local_bytes_per_second: float
    """Bandwidth per device to ranks of the same node."""
    latency_seconds: float
    """Time per round of messages; a collective of N ranks is taken to have log2(N) of them."""
    link_efficiency: float
    """Part of a link's bandwidth that is left for the bytes of tensors."""
    sources: dict[str, str]
    """Name of a number -> its origin."""

    def __post_init__(self) -> None:
        for name, value in numbers(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive, not {value}")
        if missing := [name for name in numbers(self) if name not in self.sources]:
            raise ValueError(f"sources says nothing of {', '.join(missing)}")


def numbers(rates: Rates) -> dict[str, float]:
    """Return the fields that are numbers."""
    return {field.name: getattr(rates, field.name) for field in dataclasses.fields(rates) if field.type is float}


def read_rates(path: Path) -> Rates:
    """Return the rates that `write_rates` wrote.

    Raises:
        ValueError: the file cannot be read, or does not hold rates.
    """
    try:
        return pydantic.TypeAdapter(Rates).validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read the rates {path}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{name}: " for name in first["loc"])
        raise ValueError(
            f"{path} does not hold rates of this version of bitfleet ({field}{first['msg']}): measure them with "
            f"deepspeed --num_accelerators N --module bitfleet.launch bench plan --config NAME --output {path}"
        ) from error


def write_rates(rates: Rates, path: Path) -> None:
    """Write `rates` as JSON."""
    write_atomically(path, to_json(dataclasses.asdict(rates), indent=2) + "\n")


def published(gpu: str, precision: Literal["fp32", "tf32", "bf16", "fp16"], image_size: int) -> Rates:
    """Return the rates of a GPU of the table `GPUS`, for images of `image_size` pixels a side; fp32
    is without TF32.

    Raises:
        ValueError: there is no such GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu is {gpu!r}, not one of {', '.join(GPUS)}: measure with bitfleet bench plan")
    row = GPUS[gpu]
    memory, memory_source = row["memory"]
    images_per_second, decode_source = row["decode"]
    photo = min(1.0, (image_size / PHOTO_SIZE) ** 2)
    smaller = f"; times {photo:.2g}, assumed for images of {image_size} pixels" if photo < 1 else ""

    def passes(num_bytes: float, source: str) -> tuple[float, str]:
        origin = f"{source} over {memory / 1e12:.2f} TB/s, {memory_source}; 85 % of it is assumed"
        return 1e9 * num_bytes / (0.85 * memory), origin

    table: dict[str, tuple[float, str]] = {
        "cores": row["cores"],
        "flops_per_second": row["bf16" if precision == "fp16" else precision],
        "launch_seconds": (10e-6, "assumed; on two cores of an EPYC 16 us with the CPU's kernels, 2 images of 16 px"),
        "node_seconds": (1e-6, "assumed: from the end of a kernel to the start of the next"),
        "whole_ns": passes(16, "16 bytes per weight"),
        "update_ns": passes(20.25, "20.25 bytes per weight (docs/sharding.md)"),
        "plain_update_ns": passes(100, "100 bytes per weight, the eager rule's temporaries,"),
        "decode_seconds": (photo / images_per_second, decode_source + smaller),
        "core_decode_seconds": (photo * 2.7e-3, f"bench loader on 500x375 photos, AVX-512 cores: 2.7 ms{smaller}"),
        "local_bytes_per_second": row["local"],
        "latency_seconds": (10e-6, "assumed"),
        "link_efficiency": (0.9, "assumed: headers, and collectives that do not fill the link all the time"),
    }
    values: dict[str, Any] = {name: value for name, (value, _) in table.items()}
    return Rates(name=gpu, device="gpu", sources={name: source for name, (_, source) in table.items()}, **values)


_MACS_PER_IMAGE = 4.09e9  # ResNet-50 at 224 pixels (torchvision's table of weights)
_A100_BF16, _A100_TF32 = (images * FLOP_PER_MAC * _MACS_PER_IMAGE for images in (2470, 938))
_H100_TO_A100 = 3.35 / 2.04
_DLE = "NVIDIA DeepLearningExamples, ResNet-50 PyTorch on a DGX A100 80 GB"
_RATIO = "the A100's figure times 1.64, the ratio of memory bandwidths (NVIDIA's data sheets)"
_WITHOUT_TENSOR_CORES = "passes over memory take as long, products without tensor cores have, in the data sheet,"
_FP32 = f"assumed: {{}} of TF32's figure; {_WITHOUT_TENSOR_CORES} {{}} TFLOP/s"
GPUS: dict[str, dict[str, Any]] = {
    "a100": {
        "bf16": (_A100_BF16, f"{_DLE}: AMP 2,470 images/s on one GPU"),
        "tf32": (_A100_TF32, f"{_DLE}: TF32 938 images/s on one GPU"),
        "fp32": (0.4 * _A100_TF32, _FP32.format("0.4", "19.5 of 156")),
        "memory": (2.04e12, "NVIDIA's data sheet, A100 80 GB SXM"),
        "decode": (16_621 / 8, f"{_DLE}: AMP with DALI 16,621 images/s on 8 GPUs, at least"),
        "local": (235e9, "assumed: NCCL over NVLink 3, of 300 GB/s each way in the data sheet"),
        "cores": (128.0, "DGX A100: two processors of 64 cores"),
    },
    "h100": {
        "bf16": (_H100_TO_A100 * _A100_BF16, f"{_RATIO}; MLPerf 4.0's fused ResNet-50 reaches 176e12"),
        "tf32": (_H100_TO_A100 * _A100_TF32, f"{_RATIO}, TF32"),
        "fp32": (0.55 * _H100_TO_A100 * _A100_TF32, _FP32.format("0.55", "67 of 495")),
        "memory": (3.35e12, "NVIDIA's data sheet, H100 SXM"),
        "decode": (57_383 / 8, "MLPerf training 4.0, ResNet-50, 8 H100: 57,383 images/s, DALI and JPEG hardware"),
        "local": (350e9, "assumed: NCCL over NVLink 4, of 450 GB/s each way in the data sheet"),
        "cores": (112.0, "DGX H100: two processors of 56 cores"),
    },
}
"""GPU -> (number, its source): FLOP/s by precision, bytes/s of memory, images/s of its decoders,
bytes/s to its neighbours."""
