"""What DALI calls for its inputs: paths of files or, for images in shards, their bytes, read ahead by threads."""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from bitfleet.trainer.data.request import Request

_BATCHES_AHEAD = 2
_READERS = 8  # threads that wait for a disk or a network
_Encoded = list[npt.NDArray[np.uint8]]


class Feed:
    """Gives requests to DALI and remembers those whose images have not come out yet.

    Apart from DaliPipeline, so that no reference cycle keeps a pipeline alive.
    """

    def __init__(self, *, in_shards: bool, with_windows: bool, with_flips: bool) -> None:
        self.in_flight: deque[Request] = deque()
        """Requests that DALI has got and whose batch has not been taken, oldest first."""
        self._with_windows, self._with_flips = with_windows, with_flips
        self._requests: Iterator[Request] = iter(())
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="shards") if in_shards else None
        self._ahead: deque[tuple[Request, list[Future[_Encoded]]]] = deque()

    def start(self, requests: Iterator[Request]) -> None:
        """Give `requests` from now on."""
        self._requests = requests
        self.in_flight.clear()
        self._ahead.clear()

    def stop(self) -> None:
        """Give no more; what is in flight stays so."""
        self._requests = iter(())
        self._ahead.clear()

    def again(self, first: Sequence[Request]) -> None:
        """Give `first`, then once more what is in flight, then the rest: DALI begins anew."""
        pending = [*first, *self.in_flight, *(request for request, _ in self._ahead)]
        self.start(itertools.chain(pending, self._requests))

    def __call__(self) -> tuple[Any, ...]:
        """The inputs of the next batch; StopIteration ends the iteration, DALI's own convention."""
        if self._readers is None:
            request = next(self._requests)
            images = request.images
            paths = np.char.add(os.fsencode(images.folder) + b"/", images.names[request.samples])
            # One matrix for all paths costs half of what a list of arrays does; the file system ends a path at its NUL.
            files: Any = np.ascontiguousarray(paths).view(np.uint8).reshape(len(paths), -1)
        else:
            request, files = self._read_ahead(self._readers)
        self.in_flight.append(request)
        inputs = [files]
        if self._with_windows:
            inputs += [request.windows.starts, request.windows.ends]
        if self._with_flips:
            inputs.append(request.flips)
        return tuple(inputs)

    def _read_ahead(self, readers: ThreadPoolExecutor) -> tuple[Request, _Encoded]:
        while len(self._ahead) <= _BATCHES_AHEAD and (request := next(self._requests, None)):
            shares = np.array_split(np.arange(len(request.samples)), min(_READERS, len(request.samples)))
            self._ahead.append((request, [readers.submit(_read, request, share) for share in shares]))
        if not self._ahead:
            raise StopIteration
        request, futures = self._ahead[0]
        encoded = [image for future in futures for image in future.result()]
        self._ahead.popleft()
        return request, encoded


def _read(request: Request, positions: npt.NDArray[np.int64]) -> _Encoded:
    encoded = []
    for position in positions.tolist():
        try:
            encoded.append(np.frombuffer(request.read(position), np.uint8))
        except OSError:  # DALI fails at it, and then the reason is looked for
            encoded.append(np.zeros(1, np.uint8))
    return encoded
