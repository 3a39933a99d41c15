"""BatchNorm's running statistics over replicas.

Every replica (micro-batch) normalises with its own batch statistics and advances its own running
ones; after each step the running statistics are the mean over all replicas, as Keras' are under the
paper's MirroredStrategy. DeepSpeed never touches buffers: without this each rank would validate
another network.

They are averages over steps, and the weights of a binary network flip meanwhile: `measure` finds
those of the present weights.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitfleet.optim.sharding.buckets import tree_sum, tree_sum_rows
from bitfleet.trainer.ranks.collectives import all_gather_tensors


class RunningStatistics:
    """Floating-point buffers of a model, read and written as one flat tensor.

    They stay separate tensors: as views of one, torch.compile would have to treat them as aliases
    of each other. Run each micro-batch inside `replica`, then call `end_step` once.
    """

    def __init__(self, model: nn.Module, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._counters = [counter for name, counter in model.named_buffers() if name.endswith("num_batches_tracked")]
        self._device = next(model.parameters()).device
        self.numel = sum(buffer.numel() for buffer in self._buffers)
        self._start: Tensor | None = None
        self._replicas: list[Tensor] = []

    def _read(self) -> Tensor:
        """Return a copy of all buffers, end to end."""
        flat = [buffer.reshape(-1) for buffer in self._buffers]
        return torch.cat(flat) if flat else torch.zeros(0, device=self._device)

    def _write_(self, flat: Tensor) -> None:
        if not self._buffers:
            return
        parts = flat.split([buffer.numel() for buffer in self._buffers])
        torch._foreach_copy_(self._buffers, [part.view_as(b) for part, b in zip(parts, self._buffers, strict=True)])

    def _count_down_(self, number: int | Tensor) -> None:
        if not self._counters:
            return
        if isinstance(number, Tensor):
            torch._foreach_sub_(self._counters, [number] * len(self._counters))
        else:
            torch._foreach_sub_(self._counters, number)

    @contextmanager
    def replica(self) -> Iterator[None]:
        """Start from the statistics of the start of the step, and keep those of this micro-batch
        for the mean."""
        with torch.no_grad():
            if self._start is None:
                self._start = self._read()
            else:
                self._write_(self._start)
        yield
        with torch.no_grad():
            self._replicas.append(self._read())

    @torch.no_grad()
    def measure(self, model: nn.Module, steps: Iterable[Sequence[Tensor]], forward: Callable[[Tensor], object]) -> None:
        """Set the running statistics to the means over `steps` of the batches' own, with the
        present weights.

        Known as precise BN (arXiv 2105.07576). Every rank calls this.

        Args:
            model: whose buffers these are.
            steps: the micro-batches of this rank for each step. None: nothing changes.
            forward: runs `model` on the images of a micro-batch.
        """
        norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        if not norms:
            return
        momenta, was_training = [layer.momentum for layer in norms], model.training
        model.eval()
        for layer in norms:
            layer.train()
        for number, micro_batches in enumerate(steps, start=1):
            for layer in norms:
                layer.momentum = 1 / number
            for images in micro_batches:
                with self.replica():
                    forward(images)
            self.end_step()
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
        model.train(was_training)

    @contextmanager
    def precise(
        self, model: nn.Module, steps: Iterable[Sequence[Tensor]], forward: Callable[[Tensor], object]
    ) -> Iterator[None]:
        """Inside, the statistics are those that `measure` finds; after it they are what they
        were."""
        before, counts = self._read(), [counter.clone() for counter in self._counters]
        self.measure(model, steps, forward)
        yield
        with torch.no_grad():
            self._write_(before)
            for counter, count in zip(self._counters, counts, strict=True):
                counter.copy_(count)

    @torch.no_grad()
    def end_step(self, updated: bool | Tensor = True) -> None:
        """Set the statistics to their mean over the replicas of all ranks, summed in the order of
        the gradients.

        Args:
            updated: whether the optimizer updated the network, known to the host or bool [] on the
                device. A skipped step leaves the statistics as they were at its start: its batches
                may have put NaN into them.
        """
        assert self._start is not None
        num_here = len(self._replicas)
        if updated is False:
            self._write_(self._start)
            self._count_down_(num_here)
        else:
            mean = self._replicas[0]
            if self.num_replicas > 1:
                mean = tree_sum_rows(torch.stack(all_gather_tensors(tree_sum(self._replicas)))).div_(self.num_replicas)
            if isinstance(updated, Tensor):
                self._write_(torch.where(updated, mean, self._start))
                self._count_down_(num_here - updated.long())
            elif self.num_replicas > 1:
                self._write_(mean)
                if num_here > 1:  # steps, not the forward passes that this rank happened to run
                    self._count_down_(num_here - 1)
        self._start, self._replicas = None, []
