"""Handle images that vanished or broke since they were listed."""

import sys
from collections.abc import Callable, Mapping
from typing import Literal

from PIL import Image

from bitfleet.trainer.data.decoding import decode
from bitfleet.trainer.data.request import Request
from bitfleet.trainer.data.sampler import Ints, substitute

_MOST_ATTEMPTS = 100


def image_of(request: Request, position: int) -> Image.Image:
    """Return the pixels of the image at `position`, mode RGB.

    Raises:
        OSError: It cannot be read.
        ValueError: It cannot be decoded, or no longer has the listed size.
    """
    images, sample = request.images, int(request.samples[position])
    height, width = int(images.heights[sample]), int(images.widths[sample])
    image = decode(request.read(position))
    if (image.height, image.width) != (height, width):
        raise ValueError(f"it has {image.width} x {image.height} pixels now, and had {width} x {height}")
    return image


def reason_of(request: Request, position: int) -> str | None:
    """Return why the image at `position` cannot be read; None if Pillow finds no fault."""
    try:
        image_of(request, position)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return None


class BadSamples:
    """The policy of one loader of one rank for images that cannot be read.

    Args:
        policy: "fail" raises a ValueError that names the image; "replace" continues with other
            images.
        limit: Maximum number of distinct images that this rank may replace.
        seed: Seed of the stream.
        rank: For messages.
    """

    def __init__(self, policy: Literal["fail", "replace"], limit: int, *, seed: int, rank: int) -> None:
        self._policy, self._limit, self._seed, self._rank = policy, limit, seed, rank
        self.ends_run = policy == "fail"
        """True if one unreadable image ends the run."""
        self._seen: set[str] = set()
        self.num_replaced = 0
        """Number of times an image was replaced or left out."""

    def replace(self, request: Request, unreadable: Mapping[int, str], draw: Callable[[int, Ints], Request]) -> Request:
        """Return `request` with its unreadable images replaced by others.

        Args:
            request: A training batch.
            unreadable: Position in the batch -> reason.
            draw: Returns the request for an epoch and samples, with their windows and flips.

        Raises:
            ValueError: By policy, or beyond the limit.
        """
        self._check_allowed(request, unreadable)
        original = request.samples if request.original_samples is None else request.original_samples
        samples, num_images = request.samples.copy(), len(request.images)
        for position in unreadable:
            if request.num_attempts == _MOST_ATTEMPTS:
                raise ValueError(
                    f"none of {_MOST_ATTEMPTS} others can be decoded in the place of {request.path(position)}"
                )
            samples[position] = substitute(
                self._seed, request.epoch, int(original[position]), request.num_attempts, num_images
            )
            replacement = request.images.path(samples[position])
            self._report(request, position, unreadable[position], f"replaced by {replacement}")
        self.num_replaced += len(unreadable)
        drawn = draw(request.epoch, samples)
        return drawn._replace(original_samples=original, num_attempts=request.num_attempts + 1)

    def leave_out(self, request: Request, unreadable: Mapping[int, str]) -> Request:
        """Return `request` without the unreadable images, for validation.

        Raises:
            ValueError: By policy, or beyond the limit.
        """
        self._check_allowed(request, unreadable)
        for position, reason in unreadable.items():
            self._report(request, position, reason, "left out of validation")
        self.num_replaced += len(unreadable)
        return request.without(list(unreadable))

    def _check_allowed(self, request: Request, unreadable: Mapping[int, str]) -> None:
        position, reason = next(iter(unreadable.items()))
        path = request.path(position)
        if self._policy == "fail":
            raise ValueError(
                f"the image {path} cannot be decoded ({reason}); replace the file, list all such with bitfleet data "
                "verify, or continue without it: --data.on_bad_sample replace"
            )
        new = {request.path(position) for position in unreadable} - self._seen
        if len(self._seen) + len(new) > self._limit:
            raise ValueError(
                f"more than data.max_bad_samples={self._limit} images cannot be decoded, the last of them {path} "
                f"({reason}): check the disk, or list them with bitfleet data verify"
            )

    def _report(self, request: Request, position: int, reason: str, outcome: str) -> None:
        path = request.path(position)
        if path not in self._seen:
            self._seen.add(path)
            print(
                f"bitfleet: rank {self._rank}: the image {path} cannot be decoded ({reason}); {outcome} "
                f"({len(self._seen)} of at most {self._limit})",
                file=sys.stderr,
                flush=True,
            )
