"""Batches for a model on a GPU, through the real loaders and a stream that is stood in for: the same bytes as for the CPU."""

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import nvidia.dali
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitfleet.trainer.data import (
    DataConfig,
    Dataset,
    TrainLoader,
    ValidationLoader,
    dali,
    dali_graph,
    delivery,
    loaders,
    official,
    open_dataset,
)
from bitfleet.trainer.data.delivery import Delivery, resize_on_device
from bitfleet.trainer.data.device_copies import DeviceCopies
from bitfleet.trainer.data.request import Batch, Request
from tests.unit.trainer.data.recording_stream import RecordingStream
from tests.unit.trainer.data.test_images import photo
from tests.unit.trainer.data.test_resizing import request_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
SIZES = [(50, 60), (31, 44), (80, 33), (47, 47), (40, 120), (61, 35), (90, 64)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFLEET_CACHE", str(folder / "cache"))
        for split in ("train", "val"):
            (folder / "data" / split / "a").mkdir(parents=True)
            for index, size in enumerate(SIZES):
                photo(*size, index).save(folder / "data" / split / "a" / f"{index}.jpg")
        yield str(folder / "data")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[RecordingStream]:
    """Those that loaders for a GPU take; tensors stay on the CPU."""
    taken: list[RecordingStream] = []

    def stream(device: torch.device) -> RecordingStream:
        assert device == GPU
        taken.append(RecordingStream())
        return taken[-1]

    monkeypatch.setattr(loaders, "CudaCopyStream", stream)
    return taken


def train_batches(dataset: Dataset, config: DataConfig, device: torch.device) -> list[Batch]:
    place = {"rank": 0, "world_size": 1, "local_world_size": 1}
    loader = TrainLoader(dataset, config, seed=1, global_batch_size=6, num_replicas=2, device=device, **place)
    return list(islice(loader.batches(), 5))


def configuration(root: str, **options: Any) -> DataConfig:
    return DataConfig(root=root, image_size=24, num_threads=2, val_batch_size=3, device="cpu", **options)


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {"augmentation": "pad_crop"},
        {"augmentation": "random_resized_crop"},
        {"augmentation": "random_resized_crop", "preprocessing": "official"},
    ],
    ids=["pad_crop", "random_resized_crop", "official"],
)
def test_a_model_on_a_gpu_gets_the_bytes_that_one_on_a_cpu_gets(
    root: str, streams: list[RecordingStream], loader: str, options: dict[str, Any]
) -> None:
    config = configuration(root, loader=loader, **options)
    dataset = open_dataset(config)
    for batches in (train_batches, validation_batches):
        for ours, theirs in zip(batches(dataset, config, GPU), batches(dataset, config, CPU), strict=True):
            assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in theirs]
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    training, validation = streams
    assert validation.num_copies == 3, "one copy of a batch, its labels included"
    assert training.num_copies in (5, 6)  # the batch ahead


def validation_batches(dataset: Dataset, config: DataConfig, device: torch.device) -> list[Batch]:
    return list(ValidationLoader(dataset, config, rank=0, world_size=1, local_world_size=1, device=device))


class Operations(TorchDispatchMode):
    """The torch operations of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("preprocessing", ["torchvision", "official"])
def test_the_training_thread_does_nothing_to_a_batch(root: str, loader: str, preprocessing: str) -> None:
    """Of a batch of 128 official windows on a GPU it used to queue 448 kernels and copies."""
    options: dict[str, Any] = {"augmentation": "random_resized_crop", "preprocessing": preprocessing, "loader": loader}
    config = configuration(root, **options)
    place = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": GPU}
    batches = TrainLoader(open_dataset(config), config, seed=1, global_batch_size=6, num_replicas=2, **place).batches()
    with Operations() as operations:
        for _ in range(4):
            next(batches)
    assert operations.names == []
    del batches  # which ends its threads


def test_windows_of_the_official_preprocessing_travel_as_bytes(
    root: str, streams: list[RecordingStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a batch of them is resized at once."""
    sizes: list[int] = []
    resize: Callable[..., Tensor] = delivery.resize_on_device

    def counted(windows: Tensor, *others: Any) -> Tensor:
        sizes.append(len(windows))
        return resize(windows, *others)

    monkeypatch.setattr(delivery, "resize_on_device", counted)
    config = configuration(root, augmentation="random_resized_crop", preprocessing="official", loader="torch")
    dataset = open_dataset(config)
    validation_batches(dataset, config, GPU)
    windows = official.official_central_windows(*np.array(SIZES).T, 24)
    areas = (3 * (windows.ends - windows.starts).prod(axis=1)).tolist()
    assert sizes == [sum(areas[:3]), sum(areas[3:6]), areas[6]]


@pytest.mark.parametrize(
    "options",
    [{"augmentation": "pad_crop"}, {"augmentation": "random_resized_crop", "preprocessing": "official"}],
    ids=["pad_crop", "official"],
)
def test_batches_that_dali_decodes_on_the_gpu(
    root: str, streams: list[RecordingStream], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """A DALI pipeline for the CPU stands in for that on the GPU, so the bytes are those for a model on the CPU."""
    outputs: list[Any] = []

    def next_output(pipeline: Any, stream: object) -> object:
        output = run(pipeline, stream)
        outputs.append(
            None if output is None else GpuOutput([torch.from_numpy(image) for image in map(np.array, output)])
        )
        return outputs[-1]

    run = dali._next_output
    with monkeypatch.context() as patch:
        pipeline = nvidia.dali.Pipeline
        patch.setattr(nvidia.dali, "Pipeline", lambda **arguments: pipeline(**(arguments | {"device_id": None})))
        patch.setattr(dali_graph, "gpu_decoding", lambda _: {"use_fast_idct": options["augmentation"] != "pad_crop"})
        patch.setattr(dali, "_next_output", next_output)
        config = dataclasses.replace(configuration(root, **options), device="auto")
        dataset = open_dataset(config)
        ours = [train_batches(dataset, config, GPU), validation_batches(dataset, config, GPU)]
    assert len(outputs) >= 5 + 3
    theirs = [train_batches(dataset, config, CPU), validation_batches(dataset, config, CPU)]
    for pair in zip(ours, theirs, strict=True):
        for batch, other in zip(*pair, strict=True):
            assert all(torch.equal(*tensors) for tensors in zip(batch, other, strict=True))
    assert [stream.num_copies for stream in streams][1] == 3


class GpuOutput:
    """What DALI gives for a batch that it decoded on a GPU, in memory of the CPU."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images, self.arguments = images, []  # type: ignore[var-annotated]

    def shape(self) -> list[list[int]]:
        return [list(image.shape) for image in self.images]

    def copy_to_external(self, pointer: ctypes.c_void_p, stream: object, **options: bool) -> None:
        self.arguments.append((stream, options))
        whole = torch.cat([image.flatten() for image in self.images])
        ctypes.memmove(pointer, whole.data_ptr(), len(whole))


def windows_and_request() -> tuple[list[Tensor], Request]:
    windows = [torch.from_numpy(np.array(photo(*size, index))) for index, size in enumerate(SIZES)]
    return windows, request_of(len(windows))._replace(flips=np.array([0, 1, 1, 0, 1, 0, 0], np.int32))


def test_windows_that_dali_decoded_on_the_gpu() -> None:
    windows, request = windows_and_request()
    stream = RecordingStream()
    output = GpuOutput(windows)
    ours = Delivery(DeviceCopies(stream), image_size=24, of_windows=True).batches_of_dali(iter([(output, request)]))
    ((images, labels),) = ours
    assert torch.equal(images, official.resize_windows(windows, request.flips, 24))
    assert torch.equal(labels, request.labels)
    assert output.arguments == [(None, {"non_blocking": True, "use_copy_kernel": True})]
    assert stream.num_copies == 1  # of labels and sizes


def test_images_that_dali_made_on_the_gpu() -> None:
    images, request = [torch.from_numpy(np.array(photo(24, 24, index))) for index in range(7)], request_of(7)
    copies = DeviceCopies(RecordingStream())
    output = GpuOutput(images)
    given = list(Delivery(copies, image_size=24, of_windows=False).batches_of_dali(iter([(output, request)])))
    ((batch, labels),) = given
    assert torch.equal(batch, torch.stack(images))
    assert torch.equal(labels, request.labels)
    assert batch.data_ptr() != images[0].data_ptr()


@pytest.mark.parametrize("of_windows", [False, True])
def test_a_batch_that_nothing_is_left_of(of_windows: bool) -> None:
    request = request_of(0)
    copies = DeviceCopies(RecordingStream())
    to_gpu = Delivery(copies, image_size=24, of_windows=of_windows)
    batches = [
        *Delivery(None, image_size=24, of_windows=of_windows).batches(iter([([], request)])),
        *to_gpu.batches(iter([([], request)])),
        *to_gpu.batches_of_dali(iter([(None, request)])),
    ]
    for images, labels in batches:
        assert images.shape == (0, 24, 24, 3)
        assert (labels.shape, labels.dtype) == ((0,), torch.int64)


def test_a_model_on_a_cpu_gets_what_was_decoded_without_a_copy() -> None:
    images = torch.zeros(7, 24, 24, 3, dtype=torch.uint8)
    ((batch, _),) = Delivery(None, image_size=24, of_windows=False).batches(iter([([images], request_of(7))]))
    assert batch is images


def test_where_the_kernel_fails_torch_resizes_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, request = windows_and_request()
    whole = torch.cat([window.flatten() for window in windows])
    facts = official.window_facts([window.shape for window in windows], request.flips)
    monkeypatch.setattr(delivery, "_kernel_fails", False)

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    import bitfleet.trainer.data.bicubic_kernel as kernel

    def fail(*_: object) -> Tensor:
        raise RuntimeError("gcc is not there\nsecond line\nthird line")

    monkeypatch.setattr(kernel, "resize_bicubic", fail)
    with pytest.warns(UserWarning, match="torch resizes the images, .* as Triton fails: gcc is not there second line$"):
        resized = resize_on_device(whole.as_subclass(OnGpu), facts, facts, 24)
    expected = official.resize_windows(windows, request.flips, 24)
    assert torch.equal(resized, expected)
    assert torch.equal(resize_on_device(whole.as_subclass(OnGpu), facts, facts, 24), expected)
