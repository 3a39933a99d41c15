"""Print the relative error (root mean square) of sums of gradients that travel in bf16: python
docs/rounding.py"""

import threading
from queue import SimpleQueue

import torch
from torch import Tensor

from bitfleet.optim.sharding import reduction as sharding_exchange


def halved(grads: list[Tensor]) -> Tensor:
    """Return the sum as bitfleet computes it, with one thread per rank."""
    boxes: dict[tuple[str, str], SimpleQueue[Tensor]] = {}
    parts: list[Tensor] = [torch.empty(0)] * len(grads)

    def swap(send: Tensor, received: Tensor, peer: int, _: object) -> None:
        me = threading.current_thread().name
        boxes.setdefault((me, str(peer)), SimpleQueue()).put(send.clone())
        received.copy_(boxes.setdefault((str(peer), me), SimpleQueue()).get())

    def run(rank: int) -> None:
        total = grads[rank].clone()
        scratch = torch.empty_like(total, dtype=torch.bfloat16)
        place = {"rank": rank, "world_size": len(grads)}
        parts[rank] = sharding_exchange.halving_sum(total, scratch, group=None, **place).clone()

    sharding_exchange.swap = swap
    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(len(grads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(parts)


torch.manual_seed(0)
print("ranks  halving  each rounded once  ring of bf16 sums")
for num_ranks in (2, 8, 64):
    grads = [torch.randn(204_800) for _ in range(num_ranks)]
    exact = torch.stack(grads).double().sum(0)
    ring = grads[0].bfloat16()
    for grad in grads[1:]:
        ring = (ring.float() + grad.bfloat16().float()).bfloat16()
    sums = (halved(grads), torch.stack([grad.bfloat16().double() for grad in grads]).sum(0), ring)
    errors = [float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()) for found in sums]
    print(f"{num_ranks:5}  {errors[0]:.1e}  {errors[1]:.1e}            {errors[2]:.1e}")
