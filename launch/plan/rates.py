"""How fast the parts of a machine are: a small table of published figures, or a file that `bitfleet bench plan` measured."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pydantic

from bitfleet.trainer.run.strict_json import to_json

FLOP_PER_MAC = 6
"""Forward 2 (multiply and add), backward twice that."""
PHOTO_SIZE = 224
"""Pixels of a side that the published decoders make of a photo."""
RESNET50_MACS = 4.09e9
"""Multiply-accumulates of ResNet-50 for an image of 224 pixels (torchvision's table of weights)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What one device does. A device is a GPU, or on a machine without any a core: ranks share the cores of their node.

    Every number is positive. `sources` says of each where it comes from.
    """

    name: str
    """What was rated."""
    device: Literal["gpu", "cpu"]
    """gpu: a rank has one of its own, and data, compute and launches overlap. cpu: all of it is work for the same cores."""
    cores: float
    """CPU cores of a node, unless the command line says otherwise."""
    flops_per_second: float
    """Of a device in forward and backward together, FLOP_PER_MAC for a multiply-accumulate."""
    launch_seconds: float
    """What the host needs to launch one kernel: Python, autograd, torch's dispatcher, the driver."""
    graph_seconds: float
    """What the host needs to launch a CUDA graph, whatever is in it."""
    node_seconds: float
    """What a GPU needs between two kernels of a graph."""
    whole_ns: float
    """Nanoseconds for each weight of the network and step: gradient into its bucket, sum, signs back into the weights."""
    update_ns: float
    """Nanoseconds for each weight of a rank's slice: the rule."""
    plain_update_ns: float
    """The same of the plain rule, which DeepSpeed's sharding runs (sharding none, zero1, zero2)."""
    decode_seconds: float
    """For one image decoded, cropped and resized on the device: of a GPU, or the core's time."""
    core_decode_seconds: float
    """The same on a core of a GPU machine."""
    copy_bytes_per_second: float
    """From the node's memory to a GPU, of images that its cores decoded."""
    local_bytes_per_second: float
    """Sent to ranks of the same node, for each device."""
    latency_seconds: float
    """Of one round of messages; a collective of N ranks is taken to have log2(N) of them."""
    link_efficiency: float
    """Part of a link's rate that is left for the bytes of tensors."""
    sources: dict[str, str]
    """Field -> where its number comes from."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and not 0 < value < float("inf"):
                raise ValueError(f"{field.name} must be positive, not {value}")
        if missing := [name for name in numbers(self) if name not in self.sources]:
            raise ValueError(f"sources says nothing of {', '.join(missing)}")


def numbers(rates: Rates) -> dict[str, float]:
    """The fields that are numbers."""
    return {field.name: getattr(rates, field.name) for field in dataclasses.fields(rates) if field.type is float}


def read_rates(path: Path) -> Rates:
    """The rates that `write_rates` wrote.

    Raises:
        ValueError: no such file, or not one of rates.
    """
    try:
        return pydantic.TypeAdapter(Rates).validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read the rates {path}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        if b'"module_seconds"' in path.read_bytes():
            raise ValueError(
                f"{path} has module_seconds, of a bitfleet that did not count kernel launches: measure again with "
                f"deepspeed --num_accelerators N --module bitfleet.launch bench plan --config NAME --output {path}"
            ) from error
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path} is no file of rates ({where + ': ' if where else ''}{first['msg']}): write one with "
            f"deepspeed --num_accelerators N --module bitfleet.launch bench plan --config NAME --output {path}"
        ) from error


def write_rates(rates: Rates, path: Path) -> None:
    """Write `rates` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(dataclasses.asdict(rates), indent=2) + "\n")


def published(gpu: str, precision: Literal["fp32", "tf32", "bf16", "fp16"], image_size: int) -> Rates:
    """The rates of a GPU of the table.

    Args:
        gpu: its name in `GPUS`.
        precision: what convolutions and products compute in; fp32 is without TF32.
        image_size: pixels of a side. The decoders' figures are of photos for 224 pixels.

    Raises:
        ValueError: it is not there.
    """
    if gpu not in GPUS:
        raise ValueError(
            f"there are published rates for {', '.join(GPUS)}, not for {gpu!r}: measure with bitfleet bench plan"
        )
    row = GPUS[gpu]
    flops, source = row["bf16" if precision == "fp16" else precision]
    memory, memory_source = row["memory"]
    decode, decode_source = row["decode"]
    local, local_source = row["local"]
    photo = min(1.0, (image_size / PHOTO_SIZE) ** 2)
    smaller = f"; times {photo:.2g}, assumed for images of {image_size} pixels" if photo < 1 else ""
    passes = f"over {memory / 1e12:.2f} TB/s, {memory_source}; 85 % of it is assumed"
    return Rates(
        name=gpu,
        device="gpu",
        cores=row["cores"],
        flops_per_second=flops,
        launch_seconds=10e-6,
        graph_seconds=10e-6,
        node_seconds=1e-6,
        whole_ns=1e9 * 16 / (0.85 * memory),
        update_ns=1e9 * 20.25 / (0.85 * memory),
        plain_update_ns=1e9 * 100 / (0.85 * memory),
        decode_seconds=photo / decode,
        core_decode_seconds=photo * 2.7e-3,
        copy_bytes_per_second=row["copy"],
        local_bytes_per_second=local,
        latency_seconds=10e-6,
        link_efficiency=0.9,
        sources={
            "cores": row["cores_source"],
            "flops_per_second": source,
            "launch_seconds": "assumed; on two cores of an EPYC 16 us with the CPU's own kernels on 2 images of 16 px",
            "graph_seconds": "assumed: one call of the driver, and what torch does around it",
            "node_seconds": "assumed: from the end of a kernel to the start of the next",
            "whole_ns": f"16 bytes a weight {passes}",
            "update_ns": f"20.25 bytes a weight (docs/sharding.md) {passes}",
            "plain_update_ns": f"100 bytes a weight, the eager rule's temporaries, {passes}",
            "decode_seconds": decode_source + smaller,
            "core_decode_seconds": "bitfleet bench loader on 500x375 photos, AVX-512 cores: 2.7 ms an image" + smaller,
            "copy_bytes_per_second": "assumed: 80 % of a PCIe x16 slot, of generation 4 (A100) or 5 (H100)",
            "local_bytes_per_second": local_source,
            "latency_seconds": "assumed",
            "link_efficiency": "assumed: headers, and collectives that do not fill the link all the time",
        },
    )


_A100_BF16, _A100_TF32 = 2470 * FLOP_PER_MAC * RESNET50_MACS, 938 * FLOP_PER_MAC * RESNET50_MACS
_H100_TO_A100 = 3.35 / 2.04
_DLE = "NVIDIA DeepLearningExamples, ResNet-50 PyTorch on a DGX A100 80 GB"
_RATIO = "the A100's figure times 1.64, the ratio of memory bandwidths (NVIDIA's data sheets)"
_WITHOUT_TENSOR_CORES = "passes over memory take as long, products without tensor cores have, in the data sheet,"
GPUS: dict[str, Any] = {
    "a100": {
        "bf16": (_A100_BF16, f"{_DLE}: AMP 2,470 images/s on one GPU"),
        "tf32": (_A100_TF32, f"{_DLE}: TF32 938 images/s on one GPU"),
        "fp32": (0.4 * _A100_TF32, f"assumed: 0.4 of TF32's figure; {_WITHOUT_TENSOR_CORES} 19.5 of 156 TFLOP/s"),
        "memory": (2.04e12, "NVIDIA's data sheet, A100 80 GB SXM"),
        "decode": (16_621 / 8, f"{_DLE}: AMP with DALI 16,621 images/s on 8 GPUs: so much at least is decoded"),
        "local": (235e9, "assumed: NCCL over NVLink 3, of 300 GB/s each way in the data sheet"),
        "copy": 25e9,
        "cores": 128.0,
        "cores_source": "DGX A100: two processors of 64 cores",
    },
    "h100": {
        "bf16": (_H100_TO_A100 * _A100_BF16, f"{_RATIO}; MLPerf 4.0's fused ResNet-50 reaches 176e12"),
        "tf32": (_H100_TO_A100 * _A100_TF32, f"{_RATIO}, TF32"),
        "fp32": (
            0.55 * _H100_TO_A100 * _A100_TF32,
            f"assumed: 0.55 of TF32's figure; {_WITHOUT_TENSOR_CORES} 67 of 495 TFLOP/s",
        ),
        "memory": (3.35e12, "NVIDIA's data sheet, H100 SXM"),
        "decode": (
            57_383 / 8,
            "MLPerf training 4.0, ResNet-50, 8 H100: 57,383 images/s, DALI with JPEG hardware: at least",
        ),
        "local": (350e9, "assumed: NCCL over NVLink 4, of 450 GB/s each way in the data sheet"),
        "copy": 50e9,
        "cores": 112.0,
        "cores_source": "DGX H100: two processors of 56 cores",
    },
}
"""GPU -> (number, its source): FLOP/s by precision, bytes/s of memory, images/s of its decoders, bytes/s to its neighbours."""
