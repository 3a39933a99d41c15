"""`bitfleet data verify`: every image is decoded once, whole, by the decoder of training; what fails is set aside in a list."""

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitfleet.launch.data.layouts import recognise
from bitfleet.launch.data.listing import Listing
from bitfleet.launch.data.oddities import KINDS, oddities
from bitfleet.launch.data.whole import BATCH_SIZE, WholeDecoder
from bitfleet.trainer.data.class_names import look_alikes
from bitfleet.trainer.data.dali import check_installation
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.left_out import in_words
from bitfleet.trainer.data.manifest import (
    FILE,
    QUARANTINE,
    SPLITS,
    Manifest,
    read_manifest,
    without,
    write_list,
    write_quarantine,
)
from bitfleet.trainer.data.parts import slices_of
from bitfleet.trainer.data.workers import run_jobs

REPORT = "verify.tsv"
_FAILURES = ("missing", "broken", "changed")
_IMAGES_PER_JOB = 256
_NUM_FAILURES_SHOWN, _NUM_NAMES_SHOWN = 20, 3


class Finding(NamedTuple):
    """Something about an image: a failure, or a kind of oddity."""

    split: str
    name: str
    kind: str
    """One of `_FAILURES` or of `oddities.KINDS`."""
    detail: str


class _Job(NamedTuple):
    split: str
    images: ImageList


def verify(root: Path, *, num_workers: int) -> tuple[str, int]:
    """Decode every image of the data set `root`; if it is prepared, write quarantine.tsv and verify.tsv into it.

    An image fails if it is missing, if the decoders of training do not read all of it, or if its size is no longer that of the
    manifest. The quarantine is made anew, so an image that was repaired leaves it; no image is changed or deleted. Until the
    last image is decoded nothing is written. A data set that was never prepared, in a form that is read where it lies, is listed
    first, and nothing at all is written.

    Returns:
        The report for the terminal, and the number of images that failed.

    Raises:
        ValueError: `root` is no data set or cannot be written, its images lie in a folder that is not there, no DALI, or a
            worker process died.
    """
    check_installation()
    root = root.expanduser().absolute()
    listing = None if (root / FILE).exists() else _list_anew(root, num_workers)
    if listing is None:
        prepared, _ = read_manifest(root)
        _check_folders(root, prepared.folder)
    else:
        prepared = listing.manifest
    jobs = [
        _Job(split, images.select(np.arange(start, min(start + _IMAGES_PER_JOB, len(images)))))
        for split, images in zip(SPLITS, (prepared.train, prepared.val), strict=True)
        for start in range(0, len(images), _IMAGES_PER_JOB)
    ]
    started = time.monotonic()
    weights = [len(job.images) for job in jobs]
    results = run_jobs(_verify_job, jobs, weights, num_workers=num_workers, title="verify")
    seconds = time.monotonic() - started
    findings = [finding for result in results for finding in result]
    failures = _reasons(findings)
    if listing is None:
        _write_findings(root / REPORT, findings)
        write_quarantine(root, failures)
        lines = [*_report(root, prepared, findings, failures, seconds), *_left_out(prepared.facts)]
        return "\n".join(lines), len(failures)
    failures |= listing.unread
    facts = {"left_out": listing.counts(), "incomplete": listing.all_faults(root)}
    lines = [*_report(root, prepared, findings, failures, seconds, is_prepared=False), *_left_out(facts)]
    lines += [f"NOTE: {said}" for said in look_alikes(prepared.classes)]
    return "\n".join(lines), len(failures) + len(facts["incomplete"])


def _list_anew(root: Path, num_workers: int) -> Listing:
    """The data set in `root`, which has no manifest.

    Raises:
        ValueError: there is none that can be read where it lies.
    """
    try:
        form = recognise(root)
    except ValueError as error:
        raise ValueError(
            f"{root} has no {FILE} of bitfleet data prepare, and no data set that can be listed: {error}"
        ) from None
    if form.extracted:
        raise ValueError(
            f"{root} has no {FILE}, and its images are in archives ({form.layout}): unpack them with `bitfleet data prepare "
            f"{root} DEST` first"
        )
    listing: Listing = form.make(num_workers=num_workers)
    return listing


def _left_out(facts: Mapping[str, Any]) -> Iterator[str]:
    """What prepare, or a new list, has found and not listed."""
    if words := in_words(facts.get("left_out", {})):
        yield f"not listed, and so not decoded: {words}"
    for fault in facts.get("incomplete", []):
        yield f"INCOMPLETE: {fault}"


def _check_folders(root: Path, files: Path) -> None:
    if not os.access(root, os.W_OK | os.X_OK):
        raise ValueError(
            f"{root} cannot be written, and verify puts its lists {QUARANTINE} and {REPORT} there: allow this user to write to "
            f"it, or make a manifest in a folder of your own with `bitfleet data prepare {files} DEST` and verify that"
        )
    if not files.is_dir():
        raise ValueError(
            f"the images of {root} lie in {files}, which is not there: mount it, or run bitfleet data prepare again"
        )


def _verify_job(job: _Job) -> list[Finding]:
    decoder = WholeDecoder()
    findings: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about broken EXIF and large images
        sizes = 3 * job.images.heights.astype(np.int64) * job.images.widths
        for batch in slices_of(sizes, BATCH_SIZE):
            findings += _verify_batch(job, range(batch.start, batch.stop), decoder)
    return findings


def _verify_batch(job: _Job, indices: Sequence[int], decoder: WholeDecoder) -> Iterator[Finding]:
    encoded: dict[int, bytes] = {}
    unread: dict[int, str] = {}
    for index in indices:
        try:
            encoded[index] = job.images.read(index)
        except FileNotFoundError:
            unread[index] = "the file is missing"
        except OSError as error:
            unread[index] = f"the file cannot be read ({error.strerror or error})"
    wholes = dict(zip(encoded, decoder.decoded(list(encoded.values())), strict=True))
    for index in indices:
        name = job.images.name(index)
        if index in unread:
            yield Finding(job.split, name, "missing", unread[index])
            continue
        whole = wholes[index]
        if whole.size is None:
            yield Finding(job.split, name, "broken", f"cannot be decoded ({whole.reason})")
        if changed := _changed(job.images, index, whole.size, len(encoded[index])):
            yield Finding(job.split, name, "changed", changed)
        if whole.size is not None:
            for kind, detail in oddities(encoded[index], name, by_pillow=whole.by_pillow):
                yield Finding(job.split, name, kind, detail)


def _changed(images: ImageList, index: int, size: tuple[int, int] | None, num_bytes: int) -> str | None:
    """Say how an image is no longer the one in the manifest; crop windows are made from the sizes there."""
    noted = (int(images.heights[index]), int(images.widths[index]))
    found = []
    if size is not None and size != noted:
        found.append(f"{size[1]} x {size[0]} pixels instead of {noted[1]} x {noted[0]}")
    if num_bytes != images.sizes[index]:
        found.append(f"{num_bytes:,} bytes instead of {images.sizes[index]:,}")
    return f"changed since prepare: {', '.join(found)}" if found else None


def _reasons(findings: Sequence[Finding]) -> dict[str, str]:
    """Name -> everything that is wrong with the image, for the images that failed."""
    reasons: dict[str, str] = {}
    for finding in findings:
        if finding.kind in _FAILURES:
            earlier = reasons.get(finding.name)
            reasons[finding.name] = f"{earlier}; {finding.detail}" if earlier else finding.detail
    return reasons


def _write_findings(path: Path, findings: Sequence[Finding]) -> None:
    rows = ("\t".join((f.split, f.name, f.kind, " ".join(f.detail.split()))) for f in findings)
    write_list(path, os.fsencode("\n".join(["split\tpath\tkind\tdetail", *rows]) + "\n"))


def _report(
    root: Path,
    prepared: Manifest,
    findings: Sequence[Finding],
    failures: dict[str, str],
    seconds: float,
    *,
    is_prepared: bool = True,
) -> Iterator[str]:
    num_images = len(prepared.train) + len(prepared.val)
    rate = num_images / max(seconds, 1e-9)
    yield f"{root}: {num_images:,} images decoded in {seconds:,.0f} s, {rate:,.0f} a second"
    odd = [(kind, [f.name for f in findings if f.kind == kind]) for kind in KINDS]
    if any(names for _, names in odd):
        yield f"read all the same, nothing was converted{f' (all of them: {REPORT})' if is_prepared else ''}:"
        for kind, names in odd:
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
    yield from _empty_classes(prepared, failures)
    if not is_prepared:
        yield (
            f"nothing is set aside, since {root} was never prepared: put whole files in their place, or run bitfleet data "
            "prepare with --on_bad_sample quarantine, and verify what that makes"
        )
        return
    yield (
        f"what failed is listed in {root / QUARANTINE}: training and evaluation leave it out; no file was deleted. To have it "
        "back, put whole files in its place (of other sizes: run bitfleet data prepare again) and run verify again"
    )


def _empty_classes(prepared: Manifest, failures: dict[str, str]) -> Iterator[str]:
    for split, images in zip(SPLITS, (prepared.train, prepared.val), strict=True):
        left = without(images, failures)
        empty = np.setdiff1d(images.labels, left.labels)
        if len(empty):
            names = [prepared.classes[label] for label in empty.tolist()]
            yield f"WARNING: {len(empty):,} classes have no image left in {split}: {_few(names)}"


def _few(names: Sequence[str]) -> str:
    few = ", ".join(map(_printable, names[:_NUM_NAMES_SHOWN]))
    return few + (", ..." if len(names) > _NUM_NAMES_SHOWN else "")


def _printable(name: str) -> str:
    """A name that a terminal can show, whatever bytes are in it."""
    return name.encode(errors="backslashreplace").decode()
