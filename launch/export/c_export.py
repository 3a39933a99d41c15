"""Write the network of a run as C files, and compile, measure and check them where there is a
compiler."""

import ctypes
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitfleet.c_library import CLibraryError
from bitfleet.launch.export.command import Export
from bitfleet.launch.export.export import compare, known, lower_trained, write
from bitfleet.packed.c_format import CSource, to_c
from bitfleet.packed.program import Array, Buffer

FLAGS = ("-Os", "-std=c99", "-fPIC")
SUFFIXES = ("", ".c", ".h")
ROUNDED = "the run's evaluation resizes to fractions of a pixel's value; round them to uint8 for this code"


def export_c(options: Export, rest: Sequence[str]) -> str:
    """Write OUTPUT.c and OUTPUT.h; arguments, result and errors as those of `export_packed`.

    The name of the output has the suffix .c, .h or none.
    """
    output = options.output
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--format c writes a .c and a .h file, but the output is {output}: leave out its suffix")
    trained, program = lower_trained(options, rest)
    files = to_c(program, output.stem)
    with tempfile.TemporaryDirectory() as folder:
        code_bytes = None
        try:
            library = compile_c(files, Path(folder))
        except CLibraryError as error:
            checked = f"not checked: {error}"
        else:
            checked = compare(trained, CNetwork(library, files.name, program.operations[-1].target), "the C code")
            code_bytes = size_of_code(files, library)
    paths = output.with_suffix(".h"), output.with_suffix(".c")
    for path, text in zip(paths, (files.header, files.source), strict=True):
        write(path, text.encode())
    flash = f"flash: {files.constant_bytes:,} bytes of constants and a few thousand of code"
    if code_bytes is not None:
        flash = (
            f"flash: {files.constant_bytes + code_bytes:,} bytes, {files.constant_bytes:,} of them constants "
            f"(with -Os for {platform.machine()})"
        )
    image = program.operations[0].source
    pixels = image.height * image.width * image.channels
    return "\n".join(
        [
            f"{paths[0]} and {paths[1].name}: C99, void {files.name}_run(const uint8_t *pixels, float *logits)",
            flash,
            f"RAM: {files.buffer_bytes:,} bytes of static buffers, besides {pixels:,} of pixels and the stack",
            *known(trained),
            *([ROUNDED] if program.description["preprocessing"]["geometry"] == "official" else []),
            checked,
        ]
    )


class CNetwork:
    """Compiled C files of a network.

    Args:
        library: shared library.
        name: prefix of its function.
        last: buffer of the logits.
    """

    def __init__(self, library: Path, name: str, last: Buffer) -> None:
        self._run = getattr(ctypes.CDLL(str(library)), f"{name}_run")
        self._num_logits = last.height * last.width * last.channels

    def __call__(self, images: Array) -> Array:
        """Compute logits, float32 [N, classes], of images uint8 [N, height, width, channels]."""
        logits = np.empty((len(images), self._num_logits), np.float32)
        for image, row in zip(np.ascontiguousarray(images), logits, strict=True):
            self._run(image.ctypes, row.ctypes)
        return logits


def compile_c(files: CSource, folder: Path, flags: Sequence[str] = ()) -> Path:
    """Return the shared library of C files.

    Args:
        files: from `to_c`.
        folder: gets the files and what is made of them.
        flags: more options of the compiler.

    Raises:
        CLibraryError: there is no compiler, or it fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CLibraryError("there is no C compiler (cc or gcc) on the PATH")
    for suffix, text in ((".h", files.header), (".c", files.source)):
        (folder / f"{files.stem}{suffix}").write_text(text)
    source, compiled, library = (folder / f"{files.stem}{suffix}" for suffix in (".c", ".o", ".so"))
    for command in (
        [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(compiled)],
        [compiler, "-shared", str(compiled), "-o", str(library), "-lm"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise CLibraryError(f"{Path(compiler).name} fails: {next((x for x in lines if 'error' in x), lines[-1])}")
    return library


def size_of_code(files: CSource, library: Path) -> int | None:
    """Return the bytes of code and tables besides the constants, or None without `size`."""
    size = shutil.which("size")
    if size is None:
        return None
    command = [size, str(library.with_suffix(".o"))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text, data, *_ = output.splitlines()[1].split()
    return int(text) + int(data) - files.constant_bytes
