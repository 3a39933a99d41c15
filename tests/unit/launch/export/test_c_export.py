"""`bitfleet export --format c`."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bitfleet.c_library import CLibraryError
from bitfleet.launch.export import c_export
from bitfleet.launch.export.command import Export, export
from bitfleet.launch.export.export import load_trained, logits_of
from bitfleet.packed.c_format import CSource, to_c
from bitfleet.packed.program import Program

OPTIONS = "--config fashion_quickstart --model.width 8".split()


@pytest.mark.parametrize("suffix", ["", ".c", ".h"])
def test_two_files_and_their_sizes(
    suffix: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    export([str(weights), str(folder / f"my-net{suffix}"), "--format", "c", *OPTIONS])
    header, source = folder / "my-net.h", folder / "my-net.c"
    assert sorted(folder.iterdir()) == [source, header]
    text = capsys.readouterr().out
    assert f"{header} and my-net.c: C99, void my_net_run(const uint8_t *pixels, float *logits)" in text
    assert "checked on 16 random images" in text
    assert "besides 3,072 of pixels" in text
    assert "of them constants (with -Os for" in text
    assert '#include "my-net.h"' in source.read_text()


def test_compiled_files_compute_the_logits(weights: Path, tmp_path: Path) -> None:
    export([str(weights), str(tmp_path / "net"), "--format", "c", *OPTIONS])
    trained, program = c_export.lower_trained(Export(weights, tmp_path / "net"), OPTIONS)
    files = CSource("net", "net", (tmp_path / "net.h").read_text(), (tmp_path / "net.c").read_text(), 0, 0)
    library = c_export.compile_c(files, tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = c_export.CNetwork(library, "net", program.operations[-1].target)(images)
    expected = logits_of(load_trained(weights, OPTIONS).model, images, trained.config.data)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_without_a_compiler_the_files_are_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    export([str(weights), str(tmp_path / "net"), "--format", "c", *OPTIONS])
    text = capsys.readouterr().out
    assert "not checked: there is no C compiler" in text
    assert "bytes of constants and a few thousand of code" in text
    assert (tmp_path / "net.c").exists()
    assert (tmp_path / "net.h").exists()


def test_a_compiler_that_fails_is_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'net.c:1: error: out of memory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    export([str(weights), str(tmp_path / "net"), "--format", "c", *OPTIONS])
    assert "not checked: cc fails: net.c:1: error: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(("printed", "reason"), [("", "no message"), ("first; Killed", "Killed")])
def test_a_compiler_that_names_no_error(
    printed: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"echo {line} >&2\n" for line in printed.split("; ") if line)
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{lines}exit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(CLibraryError, match=f"^cc fails: {reason}$"):
        c_export.compile_c(CSource("net", "net", "", "", 0, 0), tmp_path)


def test_wrong_code_is_not_written(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program: Program, stem: str) -> CSource:
        files = to_c(program, stem)
        return dataclasses.replace(files, source=files.source.replace("num_products - 2 *", "num_products - 3 *"))

    monkeypatch.setattr(c_export, "to_c", wrong)
    with pytest.raises(ValueError, match="the C code disagrees with the network on 1"):
        export([str(weights), str(tmp_path / "net"), "--format", "c", *OPTIONS])
    assert not (tmp_path / "net.c").exists()


def test_pixels_that_are_no_integers(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--data.augmentation random_resized_crop --data.preprocessing".split()
    for kind in ("official", "torchvision"):
        export([str(weights), str(tmp_path / "net"), "--format", "c", *OPTIONS, *options, kind])
        assert ("round them to uint8" in capsys.readouterr().out) == (kind == "official")


def test_another_suffix_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*net\.onnx[^\n]*leave out its suffix\Z"):
        export([str(weights), str(tmp_path / "net.onnx"), "--format", "c", *OPTIONS])
