"""The precisions of a training step, for benchmarks that run it without the trainer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "tf32", *AUTOCAST)


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Forward passes inside run in one of PRECISIONS; enter it around backward too, where TF32 counts as well.

    fp32 keeps convolutions and matrix products of a GPU from rounding their inputs to TF32; the others let them.
    """
    assert name in PRECISIONS, name
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = name != "fp32"
    try:
        with torch.autocast(device.type, AUTOCAST.get(name, torch.bfloat16), enabled=name in AUTOCAST):
            yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before
