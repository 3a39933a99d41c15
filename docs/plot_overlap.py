"""Draw when gradients travel: `torchrun --nproc_per_node 2 docs/plot_overlap.py OUTPUT.png`.

Rank 0 profiles one step of Bi-Real Net 18 on 64x64 images and draws the work of its threads.
"""

import sys
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer
from bitfleet.optim.sharding import reduction as sharding_exchange

ROWS = {
    "forward": ("forward", "#9ecae1"),
    "backward": ("backward", "#3182bd"),
    "swap": ("gradients (swaps)", "#d94801"),
    "step": ("optimizer.step()", "#74c476"),
    "gloo:all_gather": ("signs (all-gather)", "#fdae6b"),
}


def profile_step() -> list[tuple[str, float, float]]:
    """Profile the third step; return (key of ROWS, start, end) of each span, in ms."""
    torch.set_num_threads(1)
    model = create_model(ModelConfig(name="birealnet18", num_classes=1000))
    optimizer = ShardedOptimizer(build_optimizer(model, OptimConfig(), num_steps=10)[0], bucket_numel=1 << 20)
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(0, 1000, (16,))

    def step() -> None:
        with record_function("forward"):
            loss = nn.functional.cross_entropy(model(images), labels)
        with record_function("backward"):
            loss.backward()
        with record_function("step"):
            optimizer.step()

    step()
    step()
    dist.barrier()
    plain_swap = sharding_exchange.swap

    def shown_swap(*arguments: Any) -> None:
        with record_function("swap"):
            plain_swap(*arguments)

    sharding_exchange.swap = shown_swap
    all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # swaps have a thread of their own
    with profile(activities=[ProfilerActivity.CPU], experimental_config=all_threads) as profiler:
        step()
    found = []
    for event in profiler.events():
        name = next((key for key in ROWS if event.name.startswith(key)), None)
        if name and event.time_range.elapsed_us() > 0:
            found.append((name, event.time_range.start / 1e3, event.time_range.end / 1e3))
    return found


def plot(spans: list[tuple[str, float, float]], output: str) -> None:
    """Draw a row per kind of work, time from left to right."""
    start = min(span[1] for span in spans)
    figure, axis = plt.subplots(figsize=(10, 2.6), constrained_layout=True)
    for row, (key, (_, color)) in enumerate(ROWS.items()):
        bars = [(begin - start, end - begin) for name, begin, end in spans if name == key]
        axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=color, edgecolors="white", linewidth=0.5)
    axis.set_yticks(range(len(ROWS)), [label for label, _ in ROWS.values()])
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    axis.grid(axis="x", alpha=0.3)
    axis.set_title("One step of Bi-Real Net 18 on rank 0 of 2 (gloo): gradients travel during backward", fontsize=10)
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    measured = profile_step()
    if dist.get_rank() == 0:
        plot(measured, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
