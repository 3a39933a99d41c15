"""Run packed programs with the C library of packed.c; needs numpy and a C compiler, not torch."""

import ctypes
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitfleet.c_library import CLibraryError, load_portable_c_library
from bitfleet.packed.program import Array, read_description

_loading = threading.Lock()
"""Held while the C library has the path that a network asks for, which is one for all threads."""


@functools.cache
def library() -> ctypes.CDLL:
    """Build the C library once per machine and return it.

    Raises:
        CLibraryError: there is no compiler, or the build fails.
    """
    try:
        found = load_portable_c_library(Path(__file__).with_name("packed.c"))
    except CLibraryError as error:
        raise CLibraryError(f"the C library that runs packed networks cannot be built: {error}") from error
    found.packed_load.restype = found.packed_seconds.restype = ctypes.c_void_p
    found.packed_path.restype = ctypes.c_char_p
    found.packed_sums_size.restype = ctypes.c_size_t
    return found


class PackedNetwork:
    """A network of a program file, ready to run on the CPU.

    Threads may share one, and then take turns; copies, one per thread, run at the same time.

    Args:
        content: bytes of the file.
        description: what the file says of itself.
        path: instruction set: "avx512", "avx2", "neon" or "portable". None: the best of this CPU.

    Raises:
        ValueError: the file is foreign or damaged, or the CPU does not have `path`.
    """

    def __init__(self, content: bytes, description: dict[str, Any], path: str | None = None) -> None:
        self._library, self.description = library(), description
        self._arguments, self._turn = (content, description, path), threading.Lock()
        error = ctypes.create_string_buffer(256)
        with _loading:
            if self._library.packed_use_path(None if path is None else path.encode()):
                raise ValueError(f"this CPU does not have the path {path!r}")
            self.instructions: str = self._library.packed_path().decode()
            """Path that runs it."""
            handle = self._library.packed_load(content, ctypes.c_size_t(len(content)), error, ctypes.c_size_t(256))
        if not handle:
            raise ValueError(f"the packed program is refused: {error.value.decode()}")
        self._handle = ctypes.c_void_p(handle)
        size = (ctypes.c_int * 3)()
        self._library.packed_image_size(self._handle, size)
        self.image_size: tuple[int, int, int] = tuple(size)
        """Height, width, channels."""
        self.num_classes: int = self._library.packed_num_classes(self._handle)
        self.num_operations: int = self._library.packed_num_operations(self._handle)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle as the file, loaded again: one object owns a network of the C library."""
        return PackedNetwork, self._arguments

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.packed_free(self._handle)

    def __call__(self, images: Array, num_threads: int = 1) -> Array:
        """Compute logits, float32 [N, classes].

        Args:
            images: uint8 or float32 [N, height, width, channels], on the scale 0..255.
            num_threads: threads for each image.

        Raises:
            ValueError: images of another shape or dtype.
        """
        images, kind = self._images(images)
        logits = np.empty((len(images), self.num_classes), np.float32)
        for image, row in zip(images, logits, strict=True):
            with self._turn:  # ctypes releases the GIL, and a network has one set of buffers
                failed = self._library.packed_run(self._handle, image.ctypes, kind, row.ctypes, num_threads)
            if failed:
                raise MemoryError("there is not enough memory to run the network")
        return logits

    def sums(self, image: Array, index: int, num_threads: int = 1) -> Array:
        """Return the sums of products of binary convolution `index` for one image, int32, flat."""
        (image,), kind = self._images(image[None])
        found = np.empty(self._library.packed_sums_size(self._handle, index), np.int32)
        with self._turn:
            self._library.packed_sums(self._handle, image.ctypes, kind, index, found.ctypes, num_threads)
        return found

    def seconds(self) -> Sequence[float]:
        """Return the seconds of each operation in the last run."""
        pointer = ctypes.cast(self._library.packed_seconds(self._handle), ctypes.POINTER(ctypes.c_double))
        return pointer[: self.num_operations]

    def _images(self, images: Array) -> tuple[Array, int]:
        if images.shape[1:] != self.image_size or images.dtype not in (np.uint8, np.float32):
            size = "x".join(map(str, self.image_size))
            raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 or float32, N x {size}")
        return np.ascontiguousarray(images), int(images.dtype == np.float32)


def load(path: Path | str, *, instructions: str | None = None) -> PackedNetwork:
    """Load the program file of `bitfleet export`.

    Args:
        path: the file.
        instructions: as `path` of `PackedNetwork`.

    Raises:
        ValueError: it is not a packed program, or is damaged.
        CLibraryError: the C library cannot be built.
    """
    path = Path(path)
    description = read_description(path)
    return PackedNetwork(path.read_bytes(), description, instructions)
