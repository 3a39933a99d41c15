"""Copies to a device, one batch ahead: their order, and memory that is neither filled nor freed too early."""

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import Mock, call

import pytest
import torch
from torch import Tensor

from bitfleet.trainer.data.device_copies import CudaCopyStream, DeviceCopies
from bitfleet.trainer.data.request import Batch
from tests.unit.trainer.data.recording_stream import RecordingStream, until

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
    """CudaCopyStream against torch.cuda itself, whose objects are stood in for."""
    cuda = Mock()
    monkeypatch.setattr(torch.cuda, "Stream", cuda.Stream)
    monkeypatch.setattr(torch.cuda, "Event", cuda.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(stream))
    device = torch.device("cuda", 3)
    stream = CudaCopyStream(device)
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
