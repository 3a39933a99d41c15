"""Batches on their way to a GPU: pinned memory, copies one batch ahead, windows that the device
resizes."""

import ctypes
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any
from unittest.mock import Mock, call

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
    delivery,
    loaders,
    open_dataset,
    preprocessing,
)
from bitfleet.trainer.data.delivery import CopyStream, Delivery, DeviceCopies, resize_on_device
from bitfleet.trainer.data.request import Batch, Request
from tests.unit.trainer.data.recording_stream import RecordingStream, until
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
    """The same paths as loaders for a GPU; tensors stay on the CPU."""
    taken: list[RecordingStream] = []

    def stream(device: torch.device) -> RecordingStream:
        assert device == GPU
        taken.append(RecordingStream())
        return taken[-1]

    monkeypatch.setattr(loaders, "CopyStream", stream)
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
    """A batch of 128 official windows on a GPU used to queue 448 kernels and copies."""
    options: dict[str, Any] = {"augmentation": "random_resized_crop", "preprocessing": preprocessing, "loader": loader}
    config = configuration(root, **options)
    place = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": GPU}
    loader = TrainLoader(open_dataset(config), config, seed=1, global_batch_size=6, num_replicas=2, **place)
    batches = loader.batches()
    with Operations() as operations:
        for _ in range(4):
            next(batches)
    assert operations.names == []
    del batches
    loader._pipeline._delivery._copies._thread.shutdown()  # the batch ahead must not be counted by the next test


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
    windows = preprocessing.official_central_windows(*np.array(SIZES).T, 24)
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
    """A DALI pipeline for the CPU stands in for that on the GPU, so the bytes are those for a model
    on the CPU."""
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
        patch.setattr(dali, "gpu_decoding", lambda _: {"use_fast_idct": options["augmentation"] != "pad_crop"})
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
    """Imitate a batch that DALI decoded on a GPU, in memory of the CPU."""

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
    assert torch.equal(images, preprocessing.resize_windows(windows, request.flips, 24))
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
    facts = preprocessing.window_table([window.shape for window in windows], request.flips)
    monkeypatch.setattr(delivery, "_kernel_fails", False)

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    import bitfleet.trainer.data.bicubic_kernel as kernel

    def fail(*_: object) -> Tensor:
        raise RuntimeError("gcc is not there\nsecond line\nthird line")

    monkeypatch.setattr(kernel, "resize_bicubic", fail)
    with pytest.warns(UserWarning, match="Triton fails: gcc is not there second line$"):
        resized = resize_on_device(whole.as_subclass(OnGpu), facts, facts, 24)
    expected = preprocessing.resize_windows(windows, request.flips, 24)
    assert torch.equal(resized, expected)
    assert torch.equal(resize_on_device(whole.as_subclass(OnGpu), facts, facts, 24), expected)


SIZE = 1000


class Owner:
    """Memory that somebody else manages."""


def batches(copies: DeviceCopies, sources: Iterator[int]) -> Iterator[Batch]:
    """Batches of `SIZE` values and their label, each the number that it comes from."""

    def place(number: int) -> Batch:
        images, labels = copies.send(
            [[torch.full((SIZE // 2,), number, dtype=torch.uint8)] * 2, [torch.tensor([number])]]
        )
        return images, labels.view(torch.int64)

    return copies.batches(sources, place)


def test_the_next_copy_is_queued_before_a_batch_is_consumed() -> None:
    stream = RecordingStream(late=True)
    asked: list[int] = []
    given = batches(DeviceCopies(stream), (asked.append(number) or number for number in range(5)))  # type: ignore[func-returns-value]
    next(given)
    until(lambda: stream.num_copies == 2)  # though nobody has asked for the second batch
    assert asked == [0, 1]
    assert stream.num_done == 0, "the host waited for the device"
    assert "hand over 2 tensors after copy 0" in stream.calls
    next(given)
    until(lambda: stream.num_copies == 3)
    assert asked == [0, 1, 2]
    assert stream.threads == {"copies_0"}


def test_a_buffer_is_filled_again_only_after_its_copy() -> None:
    stream = RecordingStream(late=True)
    given = list(batches(DeviceCopies(stream), iter(range(7))))
    assert stream.num_done == 5, "a wait for each copy whose buffer was needed again, and for no other"
    assert [each for each in stream.calls if each.startswith(("wait", "copy"))] == [
        "copy 0",
        "copy 1",
        *(line for copy in range(5) for line in (f"wait for copy {copy}", f"copy {copy + 2}")),
    ]
    stream.finish()
    for number, (images, labels) in enumerate(given):
        assert images.tolist() == [number] * SIZE
        assert labels.tolist() == [number]


def test_each_batch_is_handed_over_once_and_after_its_copy() -> None:
    stream = RecordingStream()
    list(batches(DeviceCopies(stream), iter(range(4))))
    handed = [each for each in stream.calls if each.startswith("hand over")]
    assert [line.split()[2] for line in handed] == ["2"] * 4
    for number in range(4):
        after = next(index for index, each in enumerate(stream.calls) if each == f"copy {number}")
        assert stream.calls.index(handed[number]) > after


def test_pinned_memory_is_taken_once_and_grows_with_the_batches() -> None:
    stream = RecordingStream()
    copies = DeviceCopies(stream)

    def place(size: int) -> Batch:
        (sent,) = copies.send([[torch.ones(size, dtype=torch.uint8)]])
        return sent, sent

    lengths = [len(images) for images, _ in copies.batches(iter([100, 90, 128, 0, 300, 120, 10]), place)]
    assert lengths == [100, 90, 128, 0, 300, 120, 10]
    assert [each for each in stream.calls if each.startswith("pinned")] == ["pinned 128", "pinned 128", "pinned 512"]


def test_groups_keep_their_bytes_and_start_where_any_type_may() -> None:
    copies = DeviceCopies(RecordingStream())
    floats, bits, none = torch.arange(5.0), torch.arange(3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)

    def place(_: int) -> Batch:
        first, second, third, fourth = copies.send([[bits, bits[:1]], [floats.view(5, 1), floats], [], [none, none]])
        assert (first.tolist(), third.numel(), fourth.numel()) == ([0, 1, 2, 0], 0, 0)
        return second.view(torch.float32), first

    ((values, _),) = copies.batches(iter([0]), place)
    assert values.tolist() == [*floats.tolist(), *floats.tolist()]
    assert values.data_ptr() % 16 == 0


def test_an_error_comes_after_the_batches_before_it() -> None:
    def sources() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    given = batches(DeviceCopies(RecordingStream()), sources())
    assert [int(next(given)[1]) for _ in range(2)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(given)


def test_a_copy_that_fails_ends_the_iteration() -> None:
    def place(number: int) -> Batch:
        if number == 2:
            raise RuntimeError("out of memory")
        return torch.tensor(number), torch.tensor(number)

    given = DeviceCopies(RecordingStream()).batches(iter([1, 2, 3, 4]), place)
    assert int(next(given)[0]) == 1
    with pytest.raises(RuntimeError, match="out of memory"):
        next(given)


def test_copies_go_on_after_an_iteration_that_was_broken_off() -> None:
    copies = DeviceCopies(RecordingStream())
    abandoned = batches(copies, iter(range(9)))
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert [int(labels) for _, labels in batches(copies, iter([5, 6, 7]))] == [5, 6, 7]


def test_what_the_stream_reads_is_kept_until_it_has_come_past_it() -> None:
    stream = RecordingStream(late=True)
    copies = DeviceCopies(stream)
    owners: list[weakref.ref[Owner]] = []

    def place(number: int) -> Batch:
        owner = Owner()
        owners.append(weakref.ref(owner))
        (sent,) = copies.send([[torch.tensor([number])]])
        copies.keep(owner)
        return sent, sent

    given = copies.batches(iter(range(6)), place)
    next(given)
    until(lambda: len(owners) == 2)
    assert [owner() is None for owner in owners] == [False, False]
    next(given)  # the third batch waits for the buffer of the first, whose copy is made then
    until(lambda: len(owners) == 3 and stream.num_copies == 3)
    next(given)
    until(lambda: len(owners) == 4 and stream.num_copies == 4)
    assert [owner() is None for owner in owners] == [True, False, False, False]


def test_a_batch_on_cuda_waits_on_the_stream_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """CopyStream against torch.cuda itself, whose objects are stood in for."""
    cuda = Mock()
    monkeypatch.setattr(torch.cuda, "Stream", cuda.Stream)
    monkeypatch.setattr(torch.cuda, "Event", cuda.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(stream))
    device = torch.device("cuda", 3)
    stream = CopyStream(device)
    cuda.Stream.assert_called_once_with(device)
    with stream.active() as active:
        assert active is stream.handle
    event = stream.record()
    cuda.Event.return_value.record.assert_called_once_with(stream.handle)
    images, labels = Mock(spec=Tensor), Mock(spec=Tensor)
    cuda.reset_mock()
    stream.hand_over((images, labels), event)
    current = cuda.current_stream.return_value
    assert cuda.mock_calls == [call.current_stream(device), call.current_stream().wait_event(event)]
    assert images.mock_calls == labels.mock_calls == [call.record_stream(current)]
    pinned = Mock(spec=Tensor)
    stream.copy(pinned)
    assert pinned.mock_calls == [call.to(device, non_blocking=True)]
