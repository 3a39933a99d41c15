"""How large the gradients of a run are: one backward pass of its network, as it begins, on a few images."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.models import create_model
from bitfleet.optim import is_binary
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import TrainLoader, normalize, open_dataset

NUM_PIXELS = 400_000
"""Of all images together: 8 of 224 x 224, and no more than a batch of smaller ones. Seconds on a core."""


class Gradient(NamedTuple):
    """Gradients with respect to the binary weights, as they would be at the run's batch."""

    rms: float
    """Root mean square over all weights; of gradients that are mostly noise, which falls with the root of the batch."""
    smallest_rms: float
    """Of the layer with the smallest."""
    smallest_layer: str
    largest_rms: float
    """Of the layer with the largest."""
    largest_layer: str
    num_images: int
    """Images that were taken."""
    images: str
    """Which they were."""


def measure_gradient(config: TrainConfig) -> Gradient | None:
    """One backward pass on the CPU; None without binary weights.

    The images are the run's first ones where its data are on this machine, else random pixels.
    """
    torch.manual_seed(config.seed)
    model = create_model(config.model)
    params = [(name, param) for name, param in model.named_parameters() if is_binary(param)]
    if not params:
        return None
    images, labels, origin = _batch(config, min(config.global_batch_size, NUM_PIXELS // config.data.image_size**2))
    loss = nn.functional.cross_entropy(model(images), labels)
    grads = torch.autograd.grad(loss, [param for _, param in params])
    scale = (len(labels) / config.global_batch_size) ** 0.5
    layers = sorted(
        (scale * grad.square().mean().sqrt().item(), name) for grad, (name, _) in zip(grads, params, strict=True)
    )
    numel = sum(grad.numel() for grad in grads)
    return Gradient(
        rms=scale * (sum(grad.square().sum().item() for grad in grads) / numel) ** 0.5,
        smallest_rms=layers[0][0],
        smallest_layer=layers[0][1],
        largest_rms=layers[-1][0],
        largest_layer=layers[-1][1],
        num_images=len(labels),
        images=origin,
    )


def _batch(config: TrainConfig, num_images: int) -> tuple[Tensor, Tensor, str]:
    num_images = max(num_images, 2)  # BatchNorm needs two
    try:
        dataset = open_dataset(config.data)
    except ValueError:
        size = config.data.image_size
        labels = torch.randint(config.model.num_classes, (num_images,))
        return torch.randn(num_images, 3, size, size), labels, "of random pixels, as the data are not here"
    data = dataclasses.replace(config.data, loader="torch", device="cpu")
    place = {"rank": 0, "world_size": 1, "local_world_size": 1}
    loader = TrainLoader(
        dataset,
        data,
        seed=config.seed,
        global_batch_size=num_images,
        num_replicas=1,
        device=torch.device("cpu"),
        **place,
    )
    images, labels = next(loader.batches(0))
    return normalize(images, data.mean, data.std), labels, f"of {data.root}"
