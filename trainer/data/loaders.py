"""Choose the images of a rank, their order and their windows; a pipeline reads them."""

import dataclasses
import functools
import importlib.util
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from bitfleet.trainer.data import preprocessing, sampler
from bitfleet.trainer.data.augmentation import BatchAugmentation, RandAugment, batch_augmentation, rand_augment
from bitfleet.trainer.data.bad_samples import BadSamples
from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.dali import DaliPipeline
from bitfleet.trainer.data.dataset import Dataset
from bitfleet.trainer.data.delivery import CopyStream, DeviceCopies, Output
from bitfleet.trainer.data.image_list import ImageList
from bitfleet.trainer.data.memory_pipeline import MemoryPipeline, keep_in_memory
from bitfleet.trainer.data.request import Batch, Geometry, Pipeline, Request
from bitfleet.trainer.data.torch_pipeline import TorchPipeline

# Windows and flips of this many images are drawn together if nothing is read: calls of numpy cost
# more than the numbers.
_IMAGES_AHEAD = 4096


class TrainLoader:
    """The training micro-batches of one rank.

    The stream is a function of (seed, epoch, sample) alone: any number of ranks sees the same
    global batches of the same pixels, and reading can start at any step.
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
        """Check the sizes; nothing is read yet, unless data.loader is "memory".

        Args:
            dataset: From `open_dataset`.
            config: Config that it was opened with.
            seed: Seed of order, crops and flips; the same on every rank.
            global_batch_size: Images per optimizer step over all ranks; a multiple of num_replicas.
            num_replicas: Micro-batches per global batch; a multiple of world_size.
            rank: This rank, 0 .. world_size - 1.
            world_size: Number of ranks.
            local_world_size: Ranks on this machine, which share its cores.
            device: Device of the model, where batches are put.

        Raises:
            ValueError: Sizes that do not divide, a batch larger than the training set, an image too
                small for the window, an odd micro-batch to mix, data.device="gpu" for a model on
                the CPU, no DALI, or images that do not fit into memory or, kept there, cannot be
                decoded.
        """
        _check_batches(seed, global_batch_size, num_replicas, world_size, len(dataset.train))
        if config.augmentation == "pad_crop":
            _check_window_fits(dataset.train, config)
        self.steps_per_epoch = len(dataset.train) // global_batch_size
        self._images, self._config, self._seed = dataset.train, config, seed
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
        batch_size = global_batch_size // num_replicas
        from_canvases = config.loader == "memory" and config.augmentation == "pad_crop"
        self._batches_ahead = max(1, _IMAGES_AHEAD // batch_size) if from_canvases else 1
        if (config.mixup or config.cutmix) and batch_size % 2:
            raise ValueError(
                f"data.mixup and data.cutmix mix pairs of images, and a micro-batch has {batch_size}, "
                "global_batch_size / num_replicas: choose even ones"
            )
        self._augmentation = batch_augmentation(config, num_classes=len(dataset.classes), seed=seed)
        augment = rand_augment(config, seed=seed)
        self._pipeline = _pipeline(
            dataset, "training", config, self._bad, batch_size, rank, local_world_size, device, augment
        )

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches from optimizer step `start_step` on, endlessly.

        Every step has num_replicas / world_size of them. Prefetching does not stop at the end of an
        epoch.

        Yields:
            Images, uint8 (float32 on the scale 0..255 with data.preprocessing="official" or mixed)
            [global_batch_size / num_replicas, image_size, image_size, 3], and labels, int64 (mixed:
            float32 shares [N, classes]), on the device of the model.

        Raises:
            ValueError: An image cannot be decoded, by the policy of data.on_bad_sample, or the disk
                does not answer; the path is named.
        """
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must not be negative")
        batches = self._pipeline.batches(self.requests(start_step, self._batches_ahead), self._recover)
        return batches if self._augmentation is None else self._augmented(batches, start_step, self._augmentation)

    def _augmented(self, batches: Iterator[Batch], start_step: int, augment: BatchAugmentation) -> Iterator[Batch]:
        for (epoch, samples), batch in zip(self._micro_batches(start_step=start_step), batches, strict=False):
            yield augment(batch, epoch, samples)

    @property
    def num_replaced(self) -> int:
        """Images of this rank that were replaced by others so far."""
        return self._bad.num_replaced

    @property
    def device_bytes(self) -> int:
        """Bytes of decoded images on the GPU."""
        return _device_bytes(self._pipeline)

    def requests(self, start_step: int = 0, num_together: int = 1) -> Iterator[Request]:
        """Yield what `batches` reads: samples, windows and flips of micro-batches, endlessly.

        A request is for up to `num_together` micro-batches of one epoch.
        """
        micro_batches = self._micro_batches(start_step=start_step)
        for epoch, of_epoch in itertools.groupby(micro_batches, lambda micro_batch: micro_batch[0]):
            while together := [samples for _, samples in itertools.islice(of_epoch, num_together)]:
                yield self._request(epoch, together[0] if num_together == 1 else np.concatenate(together))

    def _request(self, epoch: int, samples: sampler.Ints) -> Request:
        config, seed = self._config, self._seed
        heights, widths = _sizes(self._images, samples)
        if config.augmentation == "pad_crop":
            windows = sampler.random_padded_windows(
                seed, epoch, samples, heights, widths, config.image_size, config.crop_padding
            )
        elif config.preprocessing == "official":
            windows = preprocessing.official_random_windows(seed, epoch, samples, heights, widths, config.image_size)
        else:
            windows = sampler.random_resized_windows(seed, epoch, samples, heights, widths)
        flips = sampler.random_flips(seed, epoch, samples) if config.flip else _no_flips(samples)
        return Request(self._images, samples, windows, flips, epoch)

    def _recover(self, request: Request, unreadable: Mapping[int, str]) -> Request:
        return self._bad.replace(request, unreadable, self._request)


class ValidationLoader:
    """One rank's share of the validation set, with the same batch count on every rank."""

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
            ValueError: data.device="gpu" for a model on the CPU, no DALI, or images that do not fit
                into memory or, kept there, cannot be decoded.
        """
        self._images = dataset.val
        self._config = config
        self._batches = sampler.validation_batches(len(dataset.val), config.val_batch_size, rank, world_size)
        self._device = device
        self._bad = BadSamples(config.on_bad_sample, config.max_bad_samples, seed=0, rank=rank)
        self._pipeline = _pipeline(
            dataset, "validation", config, self._bad, config.val_batch_size, rank, local_world_size, device
        )

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def device_bytes(self) -> int:
        """Bytes of decoded images on the GPU."""
        return _device_bytes(self._pipeline)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images and labels, int64 [N].

        Images are uint8 (float32 with data.preprocessing="official") [N, image_size, image_size,
        3]. N is val_batch_size or less; 0 if other ranks still have images and this one does not.
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
                windows = sampler.central_windows(heights, widths, size)
            elif self._config.preprocessing == "official":
                windows = preprocessing.official_central_windows(heights, widths, size)
            else:
                windows = sampler.resized_central_windows(heights, widths, size)
            yield Request(images, samples, windows, _no_flips(samples), epoch=0)


def decoder_of(config: DataConfig) -> Literal["dali", "torch"]:
    """Return the decoder of a run; two loaders with one decoder give the same bytes.

    data.loader="memory" decodes with DALI if it is installed. If not, it decodes with Pillow, as
    "torch" does, unless images are resized afterwards.
    """
    if config.loader != "memory":
        return config.loader
    return "dali" if config.augmentation != "pad_crop" or dali_is_installed() else "torch"


def dali_is_installed() -> bool:
    """Return True if DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of nvidia
        return False


def _pipeline(
    dataset: Dataset,
    split: Literal["training", "validation"],
    config: DataConfig,
    bad: BadSamples,
    batch_size: int,
    rank: int,
    local_world_size: int,
    device: torch.device,
    augment: RandAugment | None = None,
) -> Pipeline:
    """Return the pipeline of data.loader for one split."""
    images = dataset.train if split == "training" else dataset.val
    num_threads = _num_threads(config, local_world_size)
    if config.augmentation == "pad_crop":
        geometry: Geometry = "crop"
    elif config.preprocessing == "official":
        geometry = "crop_bicubic"
    else:
        geometry = "crop_resize" if split == "training" else "resize_crop"
    in_memory = config.loader == "memory"
    needs_copies = device.type == "cuda" and not (in_memory and geometry == "crop")
    copies = DeviceCopies(CopyStream(device)) if needs_copies else None
    output = Output(geometry, config.image_size, num_threads, config.stall_seconds, copies, augment)
    if not in_memory:
        return _reading_pipeline(config, images, output, batch_size, device)
    decoding, cpu = dataclasses.replace(config, loader=decoder_of(config), device="cpu"), torch.device("cpu")
    whole = output._replace(geometry="whole", copies=None)
    return keep_in_memory(
        dataset,
        split,
        config,
        output,
        lambda size: _reading_pipeline(decoding, images, whole, size, cpu),
        bad,
        batch_size=batch_size,
        num_ranks=local_world_size,
        device=device,
        shows_progress=rank == 0,
    )


def _reading_pipeline(
    config: DataConfig, images: ImageList, output: Output, batch_size: int, device: torch.device
) -> TorchPipeline | DaliPipeline:
    device_index = _decoding_index(config, device)
    if config.loader == "torch":
        return TorchPipeline(output)
    fast_idct = config.preprocessing == "official"
    return DaliPipeline(output, images, batch_size=batch_size, device_index=device_index, fast_idct=fast_idct)


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
    """Return the CUDA device to decode on, or None for the CPU."""
    if config.device == "gpu" and device.type != "cuda":
        raise ValueError(
            "data.device='gpu' needs a model that runs on a GPU, and it runs on the CPU here; use data.device='auto' "
            "or 'cpu'"
        )
    if config.device == "cpu" or config.loader != "dali" or device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
