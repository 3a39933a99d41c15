"""BatchNorm's running statistics over replicas.

Every replica (micro-batch) normalises with its own batch statistics and advances its own running ones; after each step the
running statistics are the mean over all replicas, as Keras' are under the paper's MirroredStrategy. DeepSpeed never touches
buffers: without this each rank would validate another network.
"""

import torch
from torch import Tensor, nn

from bitfleet.optim.buckets import tree_sum
from bitfleet.trainer.distributed import gather_from_ranks


class RunningStatistics:
    """All floating-point buffers of a model as one flat tensor, of which they become views.

    Call `start_replica` before and `end_replica` after each micro-batch, then `end_step` once.
    """

    def __init__(self, model: nn.Module, num_replicas: int) -> None:
        owners = [
            (module, key)
            for module in model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        buffers = [module._buffers[key] for module, key in owners]
        self.num_replicas = num_replicas
        self._counters = [tensor for name, tensor in model.named_buffers() if name.endswith("num_batches_tracked")]
        self.flat = (
            torch.cat([buffer.reshape(-1) for buffer in buffers if buffer is not None]) if buffers else torch.zeros(0)
        )
        offset = 0
        for module, key in owners:
            buffer = module._buffers[key]
            assert buffer is not None
            module._buffers[key] = self.flat[offset : offset + buffer.numel()].view_as(buffer)
            offset += buffer.numel()
        self._start: Tensor | None = None
        self._replicas: list[Tensor] = []

    def start_replica(self) -> None:
        """Begin where the step began."""
        if self._start is None:
            self._start = self.flat.clone()
        else:
            self.flat.copy_(self._start)

    def end_replica(self) -> None:
        """Keep this replica's statistics for the mean."""
        self._replicas.append(self.flat.clone())

    def end_step(self) -> None:
        """Set the statistics to their mean over the replicas of all ranks, summed in the order of the gradients."""
        if self.num_replicas > 1:
            mine = tree_sum(self._replicas)
            self.flat.copy_(tree_sum(gather_from_ranks(mine)).div_(self.num_replicas))
            if len(self._replicas) > 1:
                for counter in self._counters:  # steps, not the forward passes that this rank happened to run
                    counter -= len(self._replicas) - 1
        self._start, self._replicas = None, []

    def abandon_step(self) -> None:
        """Return to where the step began: it was skipped, and its batches may have put NaN into the statistics."""
        assert self._start is not None
        self.flat.copy_(self._start)
        for counter in self._counters:
            counter -= len(self._replicas)
        self._start, self._replicas = None, []
