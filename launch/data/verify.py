"""Decode every image once, whole, with the decoders of training: `bitfleet data verify`."""

import contextlib
import io
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from bitfleet.launch.data.layouts import recognise
from bitfleet.launch.data.manifest import write_file, write_quarantine
from bitfleet.launch.data.source import Listing
from bitfleet.launch.data.workers import run_jobs
from bitfleet.trainer.data.dali import FIRST_BYTES, check_installation
from bitfleet.trainer.data.decoding import MOST_PIXELS, decode, opened
from bitfleet.trainer.data.image_list import FILE, QUARANTINE, ImageList, Manifest, read_manifest
from bitfleet.trainer.data.left_out import in_words, look_alikes
from bitfleet.trainer.data.request import slices_of

REPORT = "verify.tsv"
BATCH_SIZE = 16
"""Images whose pixels are in memory together."""
KINDS = {
    "cmyk": "CMYK, read as RGB",
    "ycck": "YCCK, read as RGB",
    "colour": "LAB or YCbCr, read as RGB",
    "grey": "grey, read as RGB",
    "palette": "with a palette, read as RGB",
    "alpha": "with transparency, read without it",
    "16-bit": "of 16 bits a channel, read as 8",
    "profile": "with a colour profile or gamma other than sRGB's, which is not applied",
    "frames": "of several pictures, of which the first is read",
    "rotated": "turned by EXIF, read as they are stored",
    "turned": "TIFF files turned by their orientation, read turned",
    "long": "more than 24 times as long as wide, of which a crop shows little",
    "large": "of more than 89 million pixels, which take 0.27 to 0.72 GB each while they are decoded",
    "pillow": "that DALI does not read or reads otherwise, read by Pillow with every loader",
    "format": "of another format than the name says, read as what they are",
}
"""Kind of oddity -> what it is and how training reads it, in the order of a report."""
_FAILURES = ("missing", "broken", "changed")
_JOB_IMAGES = 256
_NUM_FAILURES_SHOWN, _NUM_NAMES_SHOWN = 20, 3
_SUFFIX_FORMATS = {
    ".jpeg": ("JPEG", "MPO"),
    ".jpg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".bmp": ("BMP",),
    ".webp": ("WEBP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".ppm": ("PPM",),
}
_EXIF_FORMATS = ("JPEG", "MPO", "TIFF", "WEBP")  # Pillow decodes a whole PNG to look for EXIF behind the pixels
_TIFF_BITS_PER_SAMPLE = 258
_PNG_DEPTH_BYTE = 24  # IHDR is always the first chunk: signature 8, length 4, "IHDR" 4, width 4, height 4, bit depth
_LONG, _LARGE = 24, MOST_PIXELS // 2
_SRGB_GAMMA, _SRGB_NAMES = 1 / 2.2, (b"sRGB", "sRGB".encode("utf-16-be"))  # as versions 2 and 4 of ICC write it


class Finding(NamedTuple):
    """A failure or an oddity of an image."""

    split: str
    name: str
    kind: str
    """One of _FAILURES or KINDS."""
    detail: str


class _Job(NamedTuple):
    split: str
    images: ImageList


def verify(root: Path, *, num_workers: int) -> tuple[str, int]:
    """Decode every image of the data set `root`; write quarantine.tsv and verify.tsv if prepared.

    An image fails if it is missing, if the decoders of training do not read all of it, or if its
    size is no longer that of the manifest. The quarantine is rewritten, so a repaired image leaves
    it; no image is changed or deleted. Nothing is written until the last image is decoded. A data
    set that was never prepared, in a layout that is read where it lies, is listed first, and
    nothing at all is written.

    Returns:
        The report for the terminal, and the number of images that failed.

    Raises:
        ValueError: `root` is not a data set or cannot be written, its images are missing, DALI is
            not installed, or a worker process died.
    """
    check_installation()
    root = root.expanduser().absolute()
    listing = None if (root / FILE).exists() else _list_unprepared(root, num_workers)
    if listing is None:
        prepared, _ = read_manifest(root)
        _check_folders(root, prepared.folder)
    else:
        prepared = listing.manifest
    jobs = [
        _Job(split, images.select(np.arange(start, min(start + _JOB_IMAGES, len(images)))))
        for split, images in prepared.splits
        for start in range(0, len(images), _JOB_IMAGES)
    ]
    started = time.monotonic()
    weights = [len(job.images) for job in jobs]
    results = run_jobs(_verify_job, jobs, weights, num_workers=num_workers, title="verify")
    seconds = time.monotonic() - started
    findings = [finding for result in results for finding in result]
    failures = _failures(findings)
    if listing is None:
        rows = ("\t".join((f.split, f.name, f.kind, " ".join(f.detail.split()))) for f in findings)
        write_file(root / REPORT, os.fsencode("\n".join(["split\tpath\tkind\tdetail", *rows]) + "\n"))
        write_quarantine(root, failures)
        lines = [*_report(root, prepared, findings, failures, seconds), *_left_out(prepared.facts)]
        return "\n".join(lines), len(failures)
    failures |= listing.unread
    facts = {"left_out": listing.counts(), "incomplete": listing.all_faults(root)}
    lines = [*_report(root, prepared, findings, failures, seconds, is_prepared=False), *_left_out(facts)]
    lines += [f"NOTE: {note}" for note in look_alikes(prepared.classes)]
    return "\n".join(lines), len(failures) + len(facts["incomplete"])


def _list_unprepared(root: Path, num_workers: int) -> Listing:
    """List the data set in `root`, which has no manifest.

    Raises:
        ValueError: There is none that can be read where it lies.
    """
    try:
        data = recognise(root)
    except ValueError as error:
        raise ValueError(
            f"{root} has no {FILE} of bitfleet data prepare, and no data set that can be listed: {error}"
        ) from None
    if data.extracted:
        raise ValueError(
            f"{root} has no {FILE}, and its images are in archives ({data.layout}): unpack them with `bitfleet data "
            f"prepare {root} DEST` first"
        )
    return data.make(num_workers=num_workers)


def _check_folders(root: Path, files: Path) -> None:
    if not os.access(root, os.W_OK | os.X_OK):
        raise ValueError(
            f"{root} cannot be written, and verify puts its lists {QUARANTINE} and {REPORT} there: allow this user to "
            f"write to it, or make a manifest in your own folder with `bitfleet data prepare {files} DEST` and "
            "verify that"
        )
    if not files.is_dir():
        raise ValueError(
            f"the images of {root} lie in {files}, which is not there: mount it, or run bitfleet data prepare again"
        )


def _verify_job(job: _Job) -> list[Finding]:
    decoder = WholeDecoder()
    findings: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Pillow, about broken EXIF and large images
        sizes = 3 * job.images.heights.astype(np.int64) * job.images.widths
        for batch in slices_of(sizes, BATCH_SIZE):
            findings += _verify_batch(job, range(batch.start, batch.stop), decoder)
    return findings


def _verify_batch(job: _Job, indices: Sequence[int], decoder: "WholeDecoder") -> Iterator[Finding]:
    encoded: dict[int, bytes] = {}
    unread: dict[int, str] = {}
    for index in indices:
        try:
            encoded[index] = job.images.read(index)
        except FileNotFoundError:
            unread[index] = "the file is missing"
        except OSError as error:
            unread[index] = f"the file cannot be read ({error.strerror or error})"
    decoded = dict(zip(encoded, decoder.decoded(list(encoded.values())), strict=True))
    for index in indices:
        name = job.images.name(index)
        if index in unread:
            yield Finding(job.split, name, "missing", unread[index])
            continue
        shape, reason, by_pillow = decoded[index]
        if shape is None:
            yield Finding(job.split, name, "broken", f"cannot be decoded ({reason})")
        if changed := _changed(job.images, index, shape, len(encoded[index])):
            yield Finding(job.split, name, "changed", changed)
        if shape is not None:
            for kind, detail in oddities(encoded[index], name, by_pillow=by_pillow):
                yield Finding(job.split, name, kind, detail)


def _changed(images: ImageList, index: int, shape: tuple[int, int] | None, num_bytes: int) -> str | None:
    """Describe how an image differs from the manifest, from whose sizes crop windows are made."""
    listed = (int(images.heights[index]), int(images.widths[index]))
    changes = []
    if shape is not None and shape != listed:
        changes.append(f"{shape[1]} x {shape[0]} pixels instead of {listed[1]} x {listed[0]}")
    if num_bytes != images.sizes[index]:
        changes.append(f"{num_bytes:,} bytes instead of {images.sizes[index]:,}")
    return f"changed since prepare: {', '.join(changes)}" if changes else None


def _failures(findings: Sequence[Finding]) -> dict[str, str]:
    """Return name -> everything that is wrong, for the images that failed."""
    reasons: dict[str, str] = {}
    for finding in findings:
        if finding.kind in _FAILURES:
            earlier = reasons.get(finding.name)
            reasons[finding.name] = f"{earlier}; {finding.detail}" if earlier else finding.detail
    return reasons


def _report(
    root: Path,
    prepared: Manifest,
    findings: Sequence[Finding],
    failures: Mapping[str, str],
    seconds: float,
    *,
    is_prepared: bool = True,
) -> Iterator[str]:
    num_images = len(prepared.train) + len(prepared.val)
    rate = num_images / max(seconds, 1e-9)
    yield f"{root}: {num_images:,} images decoded in {seconds:,.0f} s, {rate:,.0f} a second"
    names_of_kind = {kind: [f.name for f in findings if f.kind == kind] for kind in KINDS}
    if any(names_of_kind.values()):
        yield f"read anyway, nothing was converted{f' (all of them: {REPORT})' if is_prepared else ''}:"
        for kind, names in names_of_kind.items():
            if names:
                yield f"  {len(names):,} {KINDS[kind]}: {_few(names)}"
    if not failures:
        yield "every image decodes"
        return
    yield f"{len(failures):,} failed:"
    num_shown = _NUM_FAILURES_SHOWN if is_prepared else len(failures)
    for name, reason in islice(failures.items(), num_shown):
        yield f"  {_printable(name)}: {reason}"
    if (num_more := len(failures) - num_shown) > 0:
        yield f"  and {num_more:,} more"
    for split, images in prepared.splits:
        empty = np.setdiff1d(images.labels, images.without(failures).labels)
        if len(empty):
            names = [prepared.classes[label] for label in empty.tolist()]
            yield f"WARNING: {len(empty):,} classes have no image left in {split}: {_few(names)}"
    if is_prepared:
        yield (
            f"what failed is listed in {root / QUARANTINE}: training and evaluation leave it out; no file was deleted. "
            "To restore it, put whole files in its place (of other sizes: run bitfleet data prepare again) and run "
            "verify again"
        )
    else:
        yield (
            f"nothing is set aside, since {root} was never prepared: put whole files in their place, or run bitfleet "
            "data prepare with --on_bad_sample quarantine, and verify the result"
        )


def _left_out(facts: Mapping[str, Any]) -> Iterator[str]:
    """Describe what prepare, or a new listing, did not list."""
    if words := in_words(facts.get("left_out", {})):
        yield f"not listed, and so not decoded: {words}"
    for fault in facts.get("incomplete", []):
        yield f"INCOMPLETE: {fault}"


def _few(names: Sequence[str]) -> str:
    few = ", ".join(map(_printable, names[:_NUM_NAMES_SHOWN]))
    return few + (", ..." if len(names) > _NUM_NAMES_SHOWN else "")


def _printable(name: str) -> str:
    """Return a name that a terminal can show, whatever bytes are in it."""
    return name.encode(errors="backslashreplace").decode()


class Decoded(NamedTuple):
    """Result of decoding an image."""

    shape: tuple[int, int] | None
    """Height and width, pixels; None if it does not decode."""
    reason: str = ""
    """Why it does not decode."""
    by_pillow: bool = False
    """Pillow decoded it, as in training, since DALI does not, or not as Pillow does."""


class WholeDecoder:
    """Decodes whole images with DALI's CPU decoder, as dali.py uses it, else with Pillow."""

    def __init__(self) -> None:
        self._pipeline = _build(BATCH_SIZE)

    def decoded(self, encoded: Sequence[bytes]) -> list[Decoded]:
        """Decode at most BATCH_SIZE images."""
        for_dali = [index for index, image in enumerate(encoded) if image[:1] and image[0] in FIRST_BYTES]
        with _silenced_stderr():
            shapes = self._shapes([encoded[index] for index in for_dali])
        by_dali = {index: Decoded(shape) for index, shape in zip(for_dali, shapes, strict=True) if shape is not None}
        return [by_dali.get(index) or _decoded_by_pillow(image) for index, image in enumerate(encoded)]

    def _shapes(self, encoded: Sequence[bytes]) -> list[tuple[int, int] | None]:
        if not encoded:
            return []
        try:
            return _run(self._pipeline, encoded)
        except RuntimeError:  # of one image or of all; DALI names at most the first
            shapes = _one_by_one(encoded)
            self._pipeline = _build(BATCH_SIZE)  # DALI: "Current pipeline object is no longer valid"
            return shapes


def _decoded_by_pillow(encoded: bytes) -> Decoded:
    try:
        image = decode(encoded)
    except ValueError as error:
        return Decoded(None, str(error))
    return Decoded((image.height, image.width), by_pillow=True)


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Hide what DALI prints about unreadable images, which the report names or Pillow reads."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _one_by_one(encoded: Sequence[bytes]) -> list[tuple[int, int] | None]:
    shapes: list[tuple[int, int] | None] = []
    pipeline = _build(1)
    for image in encoded:
        try:
            shapes += _run(pipeline, [image])
        except RuntimeError:
            shapes.append(None)
            pipeline = _build(1)  # 2 ms, about as long as decoding a photo
    return shapes


def _run(pipeline: Any, encoded: Sequence[bytes]) -> list[tuple[int, int] | None]:
    (images,) = pipeline.run(encoded=[np.frombuffer(image, np.uint8) for image in encoded])
    return [(height, width) for height, width, _ in images.shape()]


def _build(batch_size: int) -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def oddities(encoded: bytes, name: str, *, by_pillow: bool = False) -> list[tuple[str, str]]:
    """Return (kind, detail) of everything odd in an image's header, in the order of KINDS.

    Training reads such images, but their owner should know. Empty if Pillow does not know the
    header.

    Args:
        encoded: The file.
        name: Its name, of which only the suffix counts.
        by_pillow: Pillow decoded it.
    """
    try:
        with opened(io.BytesIO(encoded)) as image:
            details = _odd_colours(image, encoded) | _odd_shape(image)
            form, suffix = str(image.format), os.path.splitext(name)[1]
    except Exception:  # a broken header raises nearly anything in Pillow; the decoders say whether it decodes
        return []
    if by_pillow:
        details["pillow"] = form
    if form not in _SUFFIX_FORMATS.get(suffix.lower(), (form,)):
        details["format"] = f"{form} named {suffix}"
    return [(kind, details[kind]) for kind in KINDS if kind in details]


def _odd_colours(image: Image.Image, encoded: bytes) -> dict[str, str]:
    details = {}
    mode, form = image.mode, str(image.format)
    if mode == "CMYK":
        details["ycck" if form == "JPEG" and image.info.get("adobe_transform") == 2 else "cmyk"] = f"{form}, 4 channels"
    if mode in ("LAB", "YCbCr"):
        details["colour"] = f"{form}, mode {mode}"
    if mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;"):
        details["grey"] = f"{form}, mode {mode}"
    if mode in ("P", "PA"):
        details["palette"] = f"{form}, mode {mode}"
    if mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        details["alpha"] = f"{form}, mode {mode}"
    if (depth := _bits(image, encoded)) > 8:
        details["16-bit"] = f"{form}, {depth} bits"
    if profile := _profile(image):
        details["profile"] = f"{form}, {profile}"
    return details


def _odd_shape(image: Image.Image) -> dict[str, str]:
    details = {}
    form, (width, height) = str(image.format), image.size
    if (frames := getattr(image, "n_frames", 1)) > 1:
        details["frames"] = f"{form}, {frames} pictures"
    if (orientation := _orientation(image)) in range(2, 9):
        details["turned" if form == "TIFF" else "rotated"] = f"orientation {orientation}"
    if max(width, height) > _LONG * min(width, height):
        details["long"] = f"{width} x {height} pixels"
    if width * height > _LARGE:
        details["large"] = f"{width} x {height} pixels"
    return details


def _bits(image: Image.Image, encoded: bytes) -> int:
    """Return the bits per channel."""
    if image.format == "PNG":  # Pillow reads 16-bit RGB as 8-bit and does not say so
        return encoded[_PNG_DEPTH_BYTE]
    if image.format == "TIFF":
        return int(np.max(image.getexif().get(_TIFF_BITS_PER_SAMPLE, 8)))
    return 16 if image.mode.startswith("I") else 8


def _profile(image: Image.Image) -> str | None:
    """Describe the colour profile or gamma if there is one and it is not sRGB's."""
    if icc := image.info.get("icc_profile"):
        return None if any(name in icc for name in _SRGB_NAMES) else f"an ICC profile of {len(icc):,} bytes"
    gamma = image.info.get("gamma")
    if gamma is None or "srgb" in image.info or abs(gamma - _SRGB_GAMMA) < 0.01:
        return None
    return f"gamma {gamma:g}"


def _orientation(image: Image.Image) -> object:
    if image.format not in _EXIF_FORMATS:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # several of ImageNet's files have broken EXIF and whole pixels
        return 1
