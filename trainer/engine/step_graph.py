"""Run the optimizer step as two CUDA graphs, for networks and batches so small that launching
kernels takes longer than they run.

The first graph holds everything up to the question whether all gradients are finite: forward and
backward of every micro-batch, running statistics, meters, the reduction. The second holds the
update. In between the host does what it does in an eager step: it learns whether the step before
was skipped, counts, and sends the rates of this step. Both read nothing from the host.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.ranks.collectives import Ranks

Batch = tuple[Tensor, ...]
"""Images, labels, and what else a step reads."""
WARM_UP_STEPS = 4
"""Eager steps first: they compile kernels, choose convolution algorithms, and make the first update
of every parameter."""


class Graph(Protocol):
    """Captured work; `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None:
        """Run it again, on the tensors that it was captured with."""


class Recorder(Protocol):
    """Captures graphs that share one pool of memory."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture what `work` launches, without running it."""

    def on_stream(self) -> AbstractContextManager[Any]:
        """Launch everything inside on the stream on which graphs are captured and replayed."""


class CudaRecorder:
    """Captures CUDA graphs on a separate stream, on which warm-up and replays run as well.

    Autograd runs the accumulation of a gradient on the stream of the parameter's first use: had
    that been another one, the capture would depend on work outside of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture what `work` launches."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (of the loader, of a save) may continue: only this one must launch nothing
        # outside of the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph

    def on_stream(self) -> AbstractContextManager[Any]:
        """Enter the stream."""
        return _Joined(self._stream)


class _Joined:
    """Context of a stream that starts after the current one and is waited for by it, both on the
    device."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._inside = stream, torch.cuda.stream(stream)
        self._outside = torch.cuda.current_stream(stream.device)

    def __enter__(self) -> None:
        self._stream.wait_stream(self._outside)
        self._inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)
        self._outside.wait_stream(self._stream)


def check_can_capture(ranks: Ranks, device: torch.device, optimizer: RoutedOptimizer) -> None:
    """Refuse anything that a graph cannot hold.

    Raises:
        ValueError: names it.
    """
    if device.type != "cuda":
        raise ValueError(f"engine.cuda_graph needs a GPU, and the model is on {device.type}: leave it out")
    if ranks.world_size > 1:
        raise ValueError(
            f"engine.cuda_graph captures the step of a single rank, and there are {ranks.world_size}: "
            f"start one rank, or leave it out"
        )
    for group in optimizer.param_groups:
        if RULES[group["rule"]].numbers is None:
            able = ", ".join(name for name, rule in RULES.items() if rule.numbers)
            raise ValueError(
                f"engine.cuda_graph cannot capture the rule {group['rule']}, which decides on the host: use one of "
                f"{able}, or leave it out"
            )


class Step(Protocol):
    """Parts of an optimizer step; `train_step.TrainStep` is one."""

    num_micro_batches: int

    def run(self, batches: Iterator[Batch]) -> None:
        """Make an eager step of the next batches."""

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next micro-batch."""

    def accumulate(self, micro_batches: Sequence[Batch]) -> None:
        """Run forward and backward of all micro-batches of a step, without DeepSpeed's engine."""

    def settle(self, updated: bool | Tensor) -> None:
        """Set running statistics and meters to those after the step; `updated` says whether it was
        skipped."""

    def end_backward(self) -> None:
        """Note on the host that forward and backward are over."""

    def end_step(self) -> None:
        """Note on the host that the step is over."""


class GraphedStep:
    """Makes optimizer steps, from the `WARM_UP_STEPS`-th on by replaying graphs.

    Args:
        step: makes the first steps, and says what a step is made of.
        optimizer: sharded, of a single rank; it `defers`.
        end_step: called after each replayed step: schedules move on.
        recorder: captures.
        network: name, for messages.
    """

    def __init__(
        self,
        step: Step,
        optimizer: ShardedOptimizer,
        end_step: Callable[[], None],
        recorder: Recorder,
        network: str,
    ) -> None:
        assert optimizer.defers
        optimizer.keeps_gradients = True
        self._step, self._optimizer, self._network = step, optimizer, network
        self._end_step, self._recorder = end_step, recorder
        self._num_eager = 0
        self._inputs: list[Batch] = []
        self._collect: Graph | None = None
        self._updates: dict[bool, Graph] = {}

    def run(self, batches: Iterator[Batch]) -> None:
        """Make one step of the next batches.

        Raises:
            ValueError: the network cannot be captured.
        """
        with self._recorder.on_stream():
            if self._num_eager < WARM_UP_STEPS:
                self._num_eager += 1
                self._step.run(batches)
                return
            self._read(batches)
            if self._collect is None:
                self._collect = self._captured(self._forward_and_backward)
            self._collect.replay()
            self._step.end_backward()
            if self._optimizer.prepare([[True] * len(bucket.segments) for bucket in self._optimizer.buckets]):
                self._update_graph().replay()
            self._end_step()
            self._step.end_step()

    def _read(self, batches: Iterator[Batch]) -> None:
        """Copy the next micro-batches to where the graph reads them."""
        for place in range(self._step.num_micro_batches):
            batch = self._step.next_batch(batches)
            if place == len(self._inputs):
                self._inputs.append(tuple(each.clone() for each in batch))
            for mine, new in zip(self._inputs[place], batch, strict=True):
                mine.copy_(new, non_blocking=True)

    def _forward_and_backward(self) -> None:
        self._step.accumulate(self._inputs)
        unused = [
            segment.name
            for bucket in self._optimizer.buckets
            for segment, used in zip(bucket.segments, bucket.used, strict=True)
            if not used
        ]
        if unused:
            raise ValueError(
                f"engine.cuda_graph needs a gradient of every parameter in every step, and {unused[0]} got "
                "none: leave it out"
            )
        self._optimizer.collect()
        self._step.settle(self._optimizer.finite)

    def _update_graph(self) -> Graph:
        """Return the graph of the update, in a logging step with its observers; captured when it is
        first needed."""
        is_observed = bool(self._optimizer.observers)
        if is_observed not in self._updates:
            self._updates[is_observed] = self._captured(self._optimizer.update)
        return self._updates[is_observed]

    def _captured(self, work: Callable[[], None]) -> Graph:
        try:
            return self._recorder.capture(work)
        except torch.OutOfMemoryError:  # a RuntimeError too
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"engine.cuda_graph cannot capture the step of {self._network}: {reason}; leave it out"
            ) from error
