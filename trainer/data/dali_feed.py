"""What DALI calls for its inputs: paths of files, or bytes that threads read ahead.

Bytes are those of images in shards, and of what Pillow decodes.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from bitfleet.trainer.data.decoding import image_of
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.plain_png import plain_png
from bitfleet.trainer.data.request import Request

_BATCHES_AHEAD = 2
_READERS = 8  # threads that wait for a disk or a network
PILLOW_SUFFIXES = (
    b".bmp",
    b".tif",
    b".tiff",
    b".ppm",
    b".pgm",
    b".pbm",
    b".pnm",
    b".pfm",
    b".jp2",
    b".j2k",
    b".j2c",
    b".jpc",
    b".jpx",
    b".jpf",
)
"""Of the formats that decoding.py is for. In a set of none of them DALI reads the files; it fails at those with other names."""
_Encoded = list[npt.NDArray[np.uint8]]


class Feed:
    """Gives requests to DALI and remembers those whose images have not come out yet.

    Apart from DaliPipeline, so that no reference cycle keeps a pipeline alive.
    """

    def __init__(
        self, *, in_shards: bool, by_pillow: npt.NDArray[np.bool_], with_windows: bool, with_flips: bool
    ) -> None:
        """Nothing is read yet.

        Args:
            in_shards: Images are parts of larger files, which DALI cannot read itself.
            by_pillow: Whether Pillow decodes an image of the list [N]; it may change before `again`.
            with_windows: Windows are an input of DALI.
            with_flips: Flips are an input of DALI.
        """
        self.in_flight: deque[Request] = deque()
        """Requests that DALI has got and whose batch has not been taken, oldest first."""
        self._with_windows, self._with_flips = with_windows, with_flips
        self._requests: Iterator[Request] = iter(())
        self._in_shards, self._by_pillow = in_shards, by_pillow
        self._readers: ThreadPoolExecutor | None = None
        self._find_readers()
        self._ahead: deque[tuple[Request, list[Future[_Encoded]]]] = deque()

    @property
    def reads(self) -> bool:
        """Whether images are given, not paths, as of the latest `start` or `again`."""
        return self._readers is not None

    def start(self, requests: Iterator[Request]) -> None:
        """Give `requests` from now on."""
        self._find_readers()
        self._requests = requests
        self.in_flight.clear()
        self._ahead.clear()

    def _find_readers(self) -> None:
        if self._readers is None and (self._in_shards or self._by_pillow.any()):
            self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="readers")

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
            self._ahead.append((request, [readers.submit(_read, request, share, self._by_pillow) for share in shares]))
        if not self._ahead:
            raise StopIteration
        request, futures = self._ahead[0]
        encoded = [image for future in futures for image in future.result()]
        self._ahead.popleft()
        return request, encoded


def _read(request: Request, positions: npt.NDArray[np.int64], by_pillow: npt.NDArray[np.bool_]) -> _Encoded:
    encoded = []
    for position in positions.tolist():
        try:
            if by_pillow[request.samples[position]]:
                image = plain_png(np.asarray(image_of(request, position)))
            else:
                image = request.read(position)
        except (OSError, ValueError):  # DALI fails at it, and then the reason is looked for
            image = b"\0"
        encoded.append(np.frombuffer(image or b"\0", np.uint8))
    return encoded


def named(images: ImageList, suffixes: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """Tell which names end in one of `suffixes`, in small letters or in capitals [N]."""
    cases = [case(suffix) for suffix in suffixes for case in (bytes.lower, bytes.upper)]
    found: npt.NDArray[np.bool_] = np.any([np.strings.endswith(images.names, suffix) for suffix in cases], axis=0)
    return found
