"""Load a trained network, lower it, and compare the packed program with it."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitfleet.launch.checkpoint.tools import find
from bitfleet.launch.export.command import Export
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.text import megabytes, percent
from bitfleet.models import create_model
from bitfleet.packed.lowering import lower
from bitfleet.packed.program import Array, Program, to_bytes
from bitfleet.packed.runner import PackedNetwork
from bitfleet.trainer.checkpoint import load_initial_weights, load_model, read_meta
from bitfleet.trainer.config import TrainConfig, read_config
from bitfleet.trainer.data import DataConfig, normalize, open_dataset
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.evaluate import images_before, in_precision, predict, threads_of_run
from bitfleet.trainer.metrics import read_metrics
from bitfleet.trainer.ranks.collectives import group_of_one
from bitfleet.trainer.run.files import written_atomically

NUM_CHECKED = 16
"""Random images on which a program is compared with its network."""
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit."""
MOST_TIES = NUM_CHECKED // 2
"""A value within rounding of 0 may have another sign in the program; it changes logits by more."""

NUM_TURNS = 9


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network with weights, and what is known of it."""

    model: nn.Module
    config: TrainConfig
    description: dict[str, Any]
    remark: str = ""
    """Sentence about what is not known of it; "" for none."""


def export_packed(options: Export, rest: Sequence[str]) -> str:
    """Write the packed program of a network; return what was written, in words.

    Args:
        options: of the command.
        rest: options of the run, for a file of weights.

    Raises:
        ValueError: bad input, a network that cannot be exported, or a program that disagrees.
    """
    output = options.output
    trained, program = lower_trained(options, rest)
    content = to_bytes(program)
    network = PackedNetwork(content, program.description)
    checked = compare(trained, network, "the program")
    write(output, content)
    bits = sum(p.numel() for p in trained.model.parameters() if getattr(p, "binary", False))
    floats = sum(t.numel() for t in [*trained.model.parameters(), *trained.model.buffers()] if t.is_floating_point())
    whole = 4 * floats
    return "\n".join(
        [
            f"{output}: {megabytes(len(content))}, {bits:,} weights as bits; in fp32 {megabytes(whole)}, "
            f"{whole / len(content):.1f} times as much",
            *known(trained),
            checked,
            compare_speed(trained, network),
            f"try: bitfleet run {output} IMAGE...",
        ]
    )


def lower_trained(options: Export, rest: Sequence[str]) -> tuple[Trained, Program]:
    """Return a network and its program, as `export_packed`; `trained.config` has `image_size`."""
    trained = load_trained(options.source, rest, options.precise_bn_steps)
    config = trained.config
    if options.image_size is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=options.image_size))
        trained = dataclasses.replace(trained, config=config)
    data = config.data
    description = trained.description | {"preprocessing": preprocessing_of(data)}
    try:
        return trained, lower(trained.model, data.image_size, data.mean, data.std, description)
    except RuntimeError as error:
        raise ValueError(
            f"the network {config.model.name} cannot be exported for images of {data.image_size} pixels: "
            f"{str(error).splitlines()[0]}"
        ) from error


def write(output: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        with written_atomically(output) as path:
            path.write_bytes(content)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror or error}") from error


def known(trained: Trained) -> list[str]:
    """Return the lines that say the accuracy of the run, and what is not known."""
    remarks = [trained.remark] if trained.remark else []
    top1 = trained.description.get("top1")
    if top1 is None:
        return remarks
    precision, fp32 = trained.config.engine.precision, ""
    if precision not in ("auto", "fp32"):
        fp32 = f" in {precision}; `bitfleet evaluate --precision fp32` gives that of the exported network"
    return [f"accuracy of the run: top-1 {percent(top1)}{fp32}", *remarks]


def load_trained(source: Path, rest: Sequence[str], precise_bn_steps: int | None = None) -> Trained:
    """Return the network of a run, a checkpoint, or a file of weights with the options of a run.

    Args:
        source: one of them.
        rest: options of the run, for a file of weights.
        precise_bn_steps: optimizer steps whose images give the BatchNorm statistics; 0: the running
            averages. None: as the run validated.

    Raises:
        ValueError: there is none, it is damaged or does not fit, or options where a run has them.
    """
    if source.is_file():
        if precise_bn_steps:
            raise ValueError(f"--precise_bn_steps needs a run or a checkpoint, and {source} is a file of weights")
        config = parse_train(rest, "bitfleet export")
        model = create_model(dataclasses.replace(config.model, initial_weights="signs"))
        load_initial_weights(model, config.model, source, config.init_scales, new_head=False)
        try:
            classes = list(open_dataset(config.data).classes)
        except ValueError:  # the data are not here
            classes = []
        remark = ""
        if len(classes) != config.model.num_classes:
            classes = [str(label) for label in range(config.model.num_classes)]
            remark = f"classes are numbered: {config.data.root} is not here, or has others (--data.root names another)"
        description = {"network": config.model.name, "classes": classes, "source": source.name}
        return Trained(model, config, description, remark)
    if not source.exists():
        raise ValueError(f"there is no run, checkpoint or file of weights at {source}")
    if rest:
        raise ValueError(f"bitfleet export takes no {rest[0]} for a run, whose configuration is in its folder")
    checkpoint = find(source)
    config, meta = read_config(checkpoint.parents[1]), read_meta(checkpoint)
    model = create_model(dataclasses.replace(config.model, initial_weights="signs"))
    load_model(model, checkpoint)
    description = {
        "network": config.model.name,
        "classes": meta["classes"],
        "source": f"{config.name}, step {meta['step']}",
    }
    validated_with = config.precise_bn_steps or 0
    num_steps = validated_with if precise_bn_steps is None else precise_bn_steps
    for record in read_metrics(checkpoint.parents[1]):
        if record["kind"] == "validation" and record["step"] == meta["step"] and num_steps == validated_with:
            description["top1"] = record["top1"]
    if not num_steps:
        return Trained(model, config, description)
    _measure_statistics(model, config, meta, num_steps)
    return Trained(
        model, config, description, f"BatchNorm's statistics are those of the images of the last {num_steps} steps"
    )


def _measure_statistics(model: nn.Module, config: TrainConfig, meta: Mapping[str, Any], num_steps: int) -> None:
    """Set the running statistics of a network to those of the images of its last steps, in fp32."""
    cpu = torch.device("cpu")
    config = in_precision(config, "fp32")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, device="auto"))
    try:
        dataset = open_dataset(config.data)
    except ValueError as error:
        raise ValueError(
            f"{error}; BatchNorm's statistics are measured on training images of the run, unless you pass "
            "--precise_bn_steps 0"
        ) from error
    with group_of_one() as alone, threads_of_run(meta):
        steps = images_before(meta, config, dataset, num_steps, alone, cpu)
        RunningStatistics(model, meta["num_replicas"]).measure(
            model, steps, functools.partial(predict, model, config, cpu)
        )


def preprocessing_of(data: DataConfig) -> dict[str, Any]:
    """Return how the evaluation of a run crops and resizes."""
    geometry = "crop" if data.augmentation == "pad_crop" else "resize_crop"
    if data.preprocessing == "official":
        geometry = "official"
    return {"geometry": geometry, "image_size": data.image_size}


def compare(trained: Trained, exported: Callable[[Array], Array], name: str) -> str:
    """Run both on random images; return how far their logits agree, in words.

    Args:
        trained: the network.
        exported: logits of images uint8 [N, H, W, 3] by what was made of it.
        name: of that, in words.

    Raises:
        ValueError: they differ on more images than values within rounding of 0 can explain.
    """
    data = trained.config.data
    shape = (NUM_CHECKED, data.image_size, data.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected, found = logits_of(trained.model, images, data), exported(images)
    if not np.isfinite(expected).all():
        raise ValueError("the network predicts nothing: its logits are not finite; export an earlier checkpoint")
    if not expected.any():
        raise ValueError("the network predicts nothing: its logits are all 0; train it, or export another checkpoint")
    differences = np.abs(found - expected).max(1) / np.abs(expected).max()
    num_ties = int((~(differences <= TOLERANCE)).sum())  # or not a number
    if num_ties > MOST_TIES:
        raise ValueError(
            f"{name} disagrees with the network on {num_ties} of {NUM_CHECKED} random images, by up to "
            f"{differences.max():.1e} of the largest logit: this is a defect of bitfleet; please report it"
        )
    agreeing = differences[differences <= TOLERANCE].max()
    text = f"checked on {NUM_CHECKED} random images: logits within {agreeing:.0e} of the largest"
    if num_ties:
        text += f" on {NUM_CHECKED - num_ties}; on {num_ties} a value within rounding of 0 has another sign"
    return text


def compare_speed(trained: Trained, network: PackedNetwork) -> str:
    """Time both in turns on one image and one thread; return the medians, in words."""
    shape = (1, trained.config.data.image_size, trained.config.data.image_size, 3)
    image = np.zeros(shape, np.uint8)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    packed_times, torch_times = [], []
    for _ in range(1 + NUM_TURNS):
        start = time.perf_counter()
        network(image)
        between = time.perf_counter()
        logits_of(trained.model, image, trained.config.data)
        packed_times.append(between - start)
        torch_times.append(time.perf_counter() - between)
    torch.set_num_threads(num_threads)
    packed, in_torch = (1e3 * statistics.median(times[1:]) for times in (packed_times, torch_times))
    return (
        f"{packed:.2f} ms per image on one thread of this CPU ({network.instructions}); the network in torch "
        f"{in_torch:.2f} ms, {in_torch / packed:.1f} times as long"
    )


def logits_of(model: nn.Module, images: Array, data: DataConfig) -> Array:
    """Return the logits of the trainer's own network in fp32.

    Args:
        model: on the CPU, in any mode; it is left as it was.
        images: uint8 or float32 [N, H, W, 3].
        data: mean and std.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        rows = [model(normalize(torch.from_numpy(image[None]), data.mean, data.std)) for image in images]
    model.train(was_training)
    found: Array = torch.cat(rows).numpy()
    assert math.prod(found.shape) > 0
    return found
