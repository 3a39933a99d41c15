"""Check what observers of a sharded optimizer are told."""

import torch
from torch import Tensor, nn

from bitfleet.optim import Bop, ShardedOptimizer
from bitfleet.optim.kernels.bits import unpack_signs
from bitfleet.optim.sharding.buckets import Bucket


def test_observers_are_told_what_flipped() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(10, 13).sign())
    sharded = ShardedOptimizer(Bop([param], gamma=1.0, threshold=0.5))
    told: list[Tensor] = []

    def observe(bucket: Bucket, grad: Tensor, flips: Tensor) -> None:
        signs = torch.empty(bucket.slice_numel)
        unpack_signs(flips, signs)
        told.append((signs > 0)[: param.numel()].view(param.shape))
        assert torch.equal(grad[: param.numel()].view(param.shape), factors)

    sharded.observers.append(observe)
    for _ in range(3):
        before, factors = param.detach().clone(), torch.randn(param.shape)
        (param * factors).sum().backward()
        sharded.step()
        assert torch.equal(told[-1], before != param)
        assert 0 < int(told[-1].sum()) < param.numel()
    sharded.close()
