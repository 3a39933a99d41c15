"""Parts of `bitfleet bench gpu`, and their measurements."""

import importlib.metadata
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from bitfleet.launch.bench.photos import find_photos, train_batches, write_class_folders
from bitfleet.launch.bench.results import Session
from bitfleet.launch.bench.timing import seconds_per_call
from bitfleet.launch.job import num_cores
from bitfleet.trainer.data import DataConfig, open_dataset

PACKAGES = "torch torchvision triton timm numpy deepspeed nvidia-dali-cuda130 nvidia-dali-cuda120 pytest".split()


def measure_probe(session: Session) -> None:
    """Write down the card and the versions; `bitfleet doctor` tells more."""
    session.add("machine", name=platform.machine(), cores=num_cores(), python=platform.python_version())
    if session.is_cuda:
        card = torch.cuda.get_device_properties(session.device)
        versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        capability, memory = f"{card.major}.{card.minor}", card.total_memory / 1e9
        session.add("card", name=card.name, memory_GB=memory, capability=capability, **versions)
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    for name in PACKAGES:
        session.add(name, version=installed.get(name, "not installed"))


def measure_update(session: Session) -> None:
    """Write down the contenders of `bitfleet bench step` on the device, the larger size first."""
    from bitfleet.launch.bench.step import SIZES, measure_step

    def measure(numel: int, num_rounds: int, weights_per_turn: int) -> None:
        for row in measure_step(numel, num_rounds, session.device, weights_per_turn=weights_per_turn):
            session.add(**row, numel=numel)

    for numel in (6400,) if session.tiny else sorted(SIZES, reverse=True):
        rounds_and_work = (1, 0) if session.tiny else (11, 50_000_000)
        session.attempt(f"{numel:,} weights", measure, numel, *rounds_and_work, needs_seconds=15.0)  # compiles


def measure_networks(session: Session) -> None:
    """Write down networks against resnet18 in every setting for which there is time."""
    from bitfleet.launch.bench.training import REFERENCE, Setting, measure_settings

    size, num_rounds, num_steps = (32, 1, 1) if session.tiny else (224, 8, 3)

    def measure(network: str, reference: Setting) -> None:
        torch.compiler.reset()  # the limit of recompilations counts over all networks of a process
        settings = [reference, reference._replace(network=network)]
        for row in measure_settings(settings, size, session.device, num_rounds=num_rounds, num_steps=num_steps):
            session.add(**row)

    references = [
        Setting(REFERENCE, 256, "bf16", is_compiled=False, deterministic=True),
        Setting(REFERENCE, 256, "bf16", is_compiled=True, deterministic=False),  # the targets: as fast as both can be
        Setting(REFERENCE, 256, "tf32", is_compiled=False, deterministic=True),
        Setting(REFERENCE, 256, "bf16", is_compiled=True, deterministic=True),
        Setting(REFERENCE, 256, "fp32", is_compiled=False, deterministic=True),
    ]
    networks = ["birealnet18", "xnornet"]
    if session.tiny:
        references, networks = [Setting(REFERENCE, 2, "bf16", is_compiled=True)], ["birealnet_small"]
    for reference in references:
        for network in networks:
            needs_seconds = 100.0 if reference.is_compiled else 25.0
            session.attempt(network, measure, network, reference, needs_seconds=needs_seconds)


def measure_dali(session: Session) -> None:
    """Write down images/s and memory of DALI's decoding, on the GPU and on the CPU."""
    num_photos, batch_size, num_batches = (8, 4, 2) if session.tiny else (512, 128, 15)

    def speed(folder: Path, preprocessing: str, decoder: str) -> None:
        options: Any = {"preprocessing": preprocessing, "device": decoder}
        config = DataConfig(root=str(folder), image_size=224, augmentation="random_resized_crop", **options)
        free = torch.cuda.mem_get_info()[0] if session.is_cuda else 0
        stream = train_batches(open_dataset(config), config, batch_size, session.device)
        seconds_per_call(lambda: next(stream), 3, session.device)
        seconds = seconds_per_call(lambda: next(stream), num_batches, session.device)
        taken = (free - torch.cuda.mem_get_info()[0]) / 1e6 if session.is_cuda else None
        session.add("speed", **options, images_per_second=batch_size / seconds, gpu_MB_taken=taken)

    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as name:
        folder = write_class_folders(find_photos(session.imagenet, num_photos, num_cores()), Path(name))
        for preprocessing in ("torchvision", "official"):
            for decoder in ("gpu", "cpu") if session.is_cuda else ("cpu",):
                session.attempt("speed", speed, folder, preprocessing, decoder, needs_seconds=10.0)
