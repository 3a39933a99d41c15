"""The reduction of a bucket over ranks that are threads: they swap through queues instead of a
process group."""

import queue
import threading

import pytest
import torch
from torch import Tensor

from bitfleet.optim.sharding import reduction as sharding_exchange
from bitfleet.optim.sharding.buckets import tree_sum, tree_sum_rows
from bitfleet.optim.sharding.reduction import Courier, can_halve, halving_sum
from tests.distributed.on_ranks.rounded import rounded_sums

SLICE = 64


@pytest.mark.parametrize("num_rows", range(1, 18))
def test_rows_are_summed_in_the_same_tree(num_rows: int) -> None:
    rows = torch.randn(num_rows, 33, generator=torch.Generator().manual_seed(num_rows))
    assert torch.equal(tree_sum_rows(rows), tree_sum(list(rows)))


@pytest.fixture
def mail(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], int]:
    """Bytes that each rank (by its thread's name) sent to each other one."""
    boxes: dict[tuple[str, str], queue.SimpleQueue[Tensor]] = {}
    sent: dict[tuple[str, int], int] = {}

    def swap(send: Tensor, received: Tensor, peer: int, _: object) -> None:
        me = threading.current_thread().name
        lock = (
            boxes.setdefault((me, str(peer)), queue.SimpleQueue()),
            boxes.setdefault((str(peer), me), queue.SimpleQueue()),
        )
        lock[0].put(send.clone())
        received.copy_(lock[1].get(timeout=10))
        sent[me, peer] = sent.get((me, peer), 0) + send.nbytes

    monkeypatch.setattr(sharding_exchange, "swap", swap)
    return sent


def halve(grads: list[Tensor], grad_dtype: torch.dtype) -> list[Tensor]:
    """The slice of every rank, each a thread."""
    world_size = len(grads)
    sums: list[Tensor] = [torch.empty(0)] * world_size

    def run(rank: int) -> None:
        total = grads[rank].clone()
        scratch = torch.empty_like(total, dtype=grad_dtype)
        sums[rank] = halving_sum(total, scratch, rank=rank, world_size=world_size, group=None).clone()

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sums


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_halving_has_the_bits_of_the_tree_and_the_bytes_of_a_reduce_scatter(
    world_size: int, mail: dict[tuple[str, int], int]
) -> None:
    torch.manual_seed(world_size)
    # Far apart, so that another order of the sum would have other bits.
    grads = [torch.randn(world_size * SLICE) * 10.0 ** torch.randint(-6, 7, (1,)) for _ in range(world_size)]
    assert torch.equal(torch.cat(halve(grads, torch.float32)), tree_sum(grads))
    check_bytes(mail, world_size, itemsize=4)


def check_bytes(mail: dict[tuple[str, int], int], world_size: int, itemsize: int) -> None:
    whole = itemsize * world_size * SLICE
    for rank in range(world_size):
        by_distance = {peer ^ rank: count for (me, peer), count in mail.items() if me == str(rank)}
        assert by_distance == {2**k: whole // 2 ** (k + 1) for k in range(world_size.bit_length() - 1)}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_bf16_rounds_what_is_swapped_and_nothing_else(world_size: int, mail: dict[tuple[str, int], int]) -> None:
    torch.manual_seed(world_size)
    grads = [torch.randn(world_size * SLICE) for _ in range(world_size)]
    expected = rounded_sums(grads)
    sums = halve(grads, torch.bfloat16)
    for rank, (each, whole) in enumerate(zip(sums, expected, strict=True)):
        assert each.dtype == torch.float32
        assert torch.equal(each, whole[rank * SLICE : (rank + 1) * SLICE])
    check_bytes(mail, world_size, itemsize=2)


def test_many_roundings_of_bf16_cost_little() -> None:
    """Gradients of 64 ranks that are mostly noise, as they are: 2^-9 / sqrt(3) of a rounding, times
    sqrt(log2(64) / 2)."""
    torch.manual_seed(0)
    grads = [torch.randn(10_000, dtype=torch.float64).float() for _ in range(64)]
    exact = torch.stack(grads).double().sum(0)

    def error(found: Tensor) -> float:
        return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    once = error(tree_sum([grad.bfloat16().float() for grad in grads]))
    assert error(rounded_sums(grads)[0]) < 2 * once < 2**-8


def test_what_can_be_halved() -> None:
    assert [n for n in range(1, 10) if can_halve(n)] == [1, 2, 4, 8]


def test_a_courier_keeps_the_order_and_hands_over_failures() -> None:
    courier, order = Courier(torch.device("cpu"), torch.float32), []
    release = threading.Event()

    def slow(total: Tensor, scratch: Tensor) -> Tensor:
        assert release.wait(10)
        order.append("slow")
        return scratch.copy_(total)

    def failing(total: Tensor, scratch: Tensor) -> Tensor:
        order.append("failing")
        raise RuntimeError("Connection closed by peer")

    first, second = courier.send(slow, torch.ones(3)), courier.send(failing, torch.ones(3))
    assert not first.done()
    release.set()
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        second.result()
    assert first.done()
    assert torch.equal(first.result(), torch.ones(3))
    assert order == ["slow", "failing"]
    courier.close()
