"""The loaders of a rank: which images it reads, in which order and with which windows. A pipeline does the reading."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from bitfleet.trainer.data import official, sampler
from bitfleet.trainer.data.bad_samples import BadSamples
from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.dali import DaliPipeline
from bitfleet.trainer.data.dataset import Dataset
from bitfleet.trainer.data.decoded_images import decoder_of
from bitfleet.trainer.data.device_copies import CudaCopyStream, DeviceCopies
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.memory_pipeline import MemoryPipeline, keep_in_memory
from bitfleet.trainer.data.request import Batch, Geometry, Pipeline, Request
from bitfleet.trainer.data.sampler import Windows
from bitfleet.trainer.data.torch_pipeline import TorchPipeline

# Windows and flips of so many images are drawn together, where nothing is read: calls of numpy cost more than the numbers.
_IMAGES_AHEAD = 4096


class TrainLoader:
    """The training micro-batches of one rank.

    The stream is a function of (seed, epoch, sample) alone: any number of ranks sees the same global batches of the
    same pixels, and every step can be started from.
    """

    steps_per_epoch: int
    """Whole global batches in the training set; the rest of an epoch is dropped."""

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        num_replicas: int,
        rank: int,
        world_size: int,
        local_world_size: int,
        device: torch.device,
    ) -> None:
        """Check the sizes; nothing is read yet, but data.loader="memory" decodes all images here.

        Args:
            dataset: From `open_dataset`.
            config: The config that it was opened with.
            seed: Of order, crops and flips; the same on every rank.
            global_batch_size: Images of one optimizer step over all ranks; a multiple of num_replicas.
            num_replicas: Micro-batches that a global batch is cut into; a multiple of world_size.
            rank: This rank, 0 .. world_size - 1.
            world_size: All ranks.
            local_world_size: Ranks on this machine, who share its cores.
            device: Where the model of this rank runs: batches come out there.

        Raises:
            ValueError: Sizes that do not divide, a batch larger than the training set, an image too small for the
                window, data.device="gpu" for a model on the CPU, no DALI, or images that do not fit into memory or, kept
                there, cannot be decoded.
        """
        _check_batches(seed, global_batch_size, num_replicas, world_size, len(dataset.train))
        if config.augmentation == "pad_crop":
            _check_window_fits(dataset.train, config)
        self.steps_per_epoch = len(dataset.train) // global_batch_size
        self._images = dataset.train
        self._config = config
        self._seed = seed
        self._micro_batches = functools.partial(
            sampler.micro_batches,
            seed=seed,
            num_samples=len(dataset.train),
            global_batch_size=global_batch_size,
            num_replicas=num_replicas,
            rank=rank,
            world_size=world_size,
        )
        self._bad = BadSamples(config.on_bad_sample, config.max_bad_samples, seed=seed, rank=rank)
        geometry, batch_size = _geometry(config, "crop_resize"), global_batch_size // num_replicas
        self._batches_ahead = 1
        self._pipeline: Pipeline
        if config.loader == "memory":
            if geometry == "crop":
                self._batches_ahead = max(1, _IMAGES_AHEAD // batch_size)
            self._pipeline = _memory_pipeline(
                config, dataset, "training", geometry, self._bad, rank, batch_size, local_world_size, device
            )
            return
        self._pipeline = _pipeline(
            config,
            dataset.train,
            geometry,
            batch_size=batch_size,
            local_world_size=local_world_size,
            device=device,
        )

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches from optimizer step `start_step` on, endlessly, over all epochs.

        Every step has num_replicas / world_size of them. Prefetching does not stop at the end of an epoch.

        Yields:
            Images, uint8 (float32 on the scale 0..255 with data.preprocessing="official") [global_batch_size / num_replicas,
            image_size, image_size, 3], and labels, int64, on the device where the model runs.

        Raises:
            ValueError: An image cannot be decoded, by the policy of data.on_bad_sample, or the disk does not answer; the path
                is named.
        """
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must not be negative")
        return self._pipeline.batches(self.requests(start_step, self._batches_ahead), self._mend)

    @property
    def num_replaced(self) -> int:
        """Images of this rank that others took the place of, so far."""
        return self._bad.num_replaced

    @property
    def device_bytes(self) -> int:
        """Bytes of decoded images that lie on the GPU."""
        return _device_bytes(self._pipeline)

    def requests(self, start_step: int = 0, num_together: int = 1) -> Iterator[Request]:
        """What `batches` reads: samples, windows and flips of this rank's micro-batches, endlessly.

        A request is for up to `num_together` of them, all of one epoch.
        """
        micro_batches = self._micro_batches(start_step=start_step)
        for epoch, those in itertools.groupby(micro_batches, lambda micro_batch: micro_batch[0]):
            while together := [samples for _, samples in itertools.islice(those, num_together)]:
                yield self._request(epoch, together[0] if num_together == 1 else np.concatenate(together))

    def _request(self, epoch: int, samples: sampler.Ints) -> Request:
        config, seed = self._config, self._seed
        heights, widths = _sizes(self._images, samples)
        if config.augmentation == "pad_crop":
            windows = sampler.random_padded_windows(
                seed, epoch, samples, heights, widths, config.image_size, config.crop_padding
            )
        elif config.preprocessing == "official":
            windows = official.official_random_windows(seed, epoch, samples, heights, widths, config.image_size)
        else:
            windows = sampler.random_resized_windows(seed, epoch, samples, heights, widths)
        flips = sampler.random_flips(seed, epoch, samples) if config.flip else _no_flips(samples)
        return Request(self._images, samples, windows, flips, epoch)

    def _mend(self, request: Request, unreadable: Mapping[int, str]) -> Request:
        return self._bad.replace(request, unreadable, self._request)


class ValidationLoader:
    """One rank's share of the validation set: over all ranks every image once, on every rank the same batch count."""

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        local_world_size: int,
        device: torch.device,
    ) -> None:
        """See TrainLoader for the arguments.

        Raises:
            ValueError: data.device="gpu" for a model on the CPU, no DALI, or images that do not fit into memory or, kept
                there, cannot be decoded.
        """
        self._images = dataset.val
        self._config = config
        self._batches = sampler.validation_batches(len(dataset.val), config.val_batch_size, rank, world_size)
        self._device = device
        self._bad = BadSamples(config.on_bad_sample, config.max_bad_samples, seed=0, rank=rank)
        geometry, batch_size = _geometry(config, "resize_crop"), config.val_batch_size
        self._pipeline: Pipeline
        if config.loader == "memory":
            self._pipeline = _memory_pipeline(
                config, dataset, "validation", geometry, self._bad, rank, batch_size, local_world_size, device
            )
            return
        self._pipeline = _pipeline(
            config,
            dataset.val,
            geometry,
            batch_size=batch_size,
            local_world_size=local_world_size,
            device=device,
        )

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def device_bytes(self) -> int:
        """Bytes of decoded images that lie on the GPU."""
        return _device_bytes(self._pipeline)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images, uint8 (float32 with data.preprocessing="official") [N, image_size, image_size, 3], and labels, int64 [N].

        N is val_batch_size or less; 0 where the other ranks still have images and this one has not.
        """
        yield from self._pipeline.batches(self._requests(), self._bad.leave_out)
        size = self._config.image_size
        for samples in self._batches:
            if len(samples) == 0:
                dtype = torch.float32 if self._config.preprocessing == "official" else torch.uint8
                images = torch.empty((0, size, size, 3), dtype=dtype, device=self._device)
                yield images, torch.empty(0, dtype=torch.int64, device=self._device)

    def _requests(self) -> Iterator[Request]:
        images, size = self._images, self._config.image_size
        for samples in self._batches:
            if len(samples) == 0:
                return
            heights, widths = _sizes(images, samples)
            if self._config.augmentation == "pad_crop":
                windows: Windows = sampler.central_windows(heights, widths, size)
            elif self._config.preprocessing == "official":
                windows = official.official_central_windows(heights, widths, size)
            else:
                windows = sampler.resized_central_windows(heights, widths, size)
            yield Request(images, samples, windows, _no_flips(samples), epoch=0)


def _geometry(config: DataConfig, resized: Geometry) -> Geometry:
    if config.augmentation == "pad_crop":
        return "crop"
    return "crop_bicubic" if config.preprocessing == "official" else resized


def _pipeline(
    config: DataConfig,
    images: ImageList,
    geometry: Geometry,
    *,
    batch_size: int,
    local_world_size: int,
    device: torch.device,
) -> TorchPipeline | DaliPipeline:
    num_threads = _num_threads(config, local_world_size)
    device_index = _decoding_index(config, device)
    copies = DeviceCopies(CudaCopyStream(device)) if device.type == "cuda" else None
    if config.loader == "torch":
        return TorchPipeline(
            geometry=geometry,
            image_size=config.image_size,
            num_threads=num_threads,
            stall_seconds=config.stall_seconds,
            copies=copies,
        )
    return DaliPipeline(
        geometry=geometry,
        image_size=config.image_size,
        batch_size=batch_size,
        num_threads=num_threads,
        device_index=device_index,
        images=images,
        stall_seconds=config.stall_seconds,
        copies=copies,
        fast_idct=config.preprocessing == "official",
    )


def _memory_pipeline(
    config: DataConfig,
    dataset: Dataset,
    split: Literal["training", "validation"],
    geometry: Geometry,
    bad: BadSamples,
    rank: int,
    batch_size: int,
    local_world_size: int,
    device: torch.device,
) -> MemoryPipeline:
    decoding = dataclasses.replace(config, loader=decoder_of(config), device="cpu")
    images = dataset.train if split == "training" else dataset.val
    return keep_in_memory(
        dataset,
        split,
        config,
        geometry,
        lambda size: _pipeline(
            decoding, images, "whole", batch_size=size, local_world_size=local_world_size, device=torch.device("cpu")
        ),
        bad,
        batch_size=batch_size,
        num_threads=_num_threads(config, local_world_size),
        num_ranks=local_world_size,
        device=device,
        shows_progress=rank == 0,
    )


def _device_bytes(pipeline: Pipeline) -> int:
    pixels = pipeline.pixels if isinstance(pipeline, MemoryPipeline) else torch.empty(0)
    return pixels.nbytes if pixels.is_cuda else 0


def _sizes(images: ImageList, samples: sampler.Ints) -> tuple[sampler.Ints, sampler.Ints]:
    return images.heights[samples].astype(np.int64), images.widths[samples].astype(np.int64)


def _no_flips(samples: sampler.Ints) -> npt.NDArray[np.int32]:
    return np.zeros(len(samples), np.int32)


def _check_batches(seed: int, global_batch_size: int, num_replicas: int, world_size: int, num_images: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must be in 0 .. 2**64 - 1")
    if num_replicas < 1 or num_replicas % world_size:
        raise ValueError(f"num_replicas={num_replicas} must be a multiple of the number of ranks, {world_size}")
    if global_batch_size < 1 or global_batch_size % num_replicas:
        raise ValueError(f"global_batch_size={global_batch_size} must be a multiple of num_replicas={num_replicas}")
    if global_batch_size > num_images:
        raise ValueError(f"global_batch_size={global_batch_size} must not exceed the {num_images} training images")


def _check_window_fits(images: ImageList, config: DataConfig) -> None:
    smaller = np.minimum(images.heights, images.widths)
    index = int(smaller.argmin())
    if smaller[index] + 2 * config.crop_padding < config.image_size:
        raise ValueError(
            f"the image {images.path(index)} ({images.widths[index]} x {images.heights[index]} pixels) with "
            f"data.crop_padding={config.crop_padding} around it is smaller than data.image_size={config.image_size}; "
            "increase crop_padding, or use data.augmentation='random_resized_crop', which resizes"
        )


def _num_threads(config: DataConfig, local_world_size: int) -> int:
    if config.num_threads is not None:
        return config.num_threads
    # A launcher may have bound this rank to its share of the cores already.
    bound = len(os.sched_getaffinity(0))
    return max(1, min(bound, (os.cpu_count() or 1) // local_world_size))


def _decoding_index(config: DataConfig, device: torch.device) -> int | None:
    """Return the CUDA device to decode on, or None for the CPU: a model on the CPU starts no CUDA."""
    if config.device == "gpu" and device.type != "cuda":
        raise ValueError(
            "data.device='gpu' needs a model that runs on a GPU, and it runs on the CPU here; use data.device='auto' or 'cpu'"
        )
    if config.device == "cpu" or config.loader != "dali" or device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
