"""Images that vanished or broke since they were listed: what a run does about them."""

import sys
from collections.abc import Callable, Mapping
from typing import Literal

from bitfleet.trainer.data.request import Request
from bitfleet.trainer.data.sampler import Ints, substitute

_MOST_ATTEMPTS = 100


class BadSamples:
    """The policy of one loader of one rank.

    Args:
        policy: "fail": a ValueError that names the image. "replace": go on with others.
        limit: so many different images, and not one more, are replaced by this rank.
        seed: of the stream.
        rank: for the message.
    """

    def __init__(self, policy: Literal["fail", "replace"], limit: int, *, seed: int, rank: int) -> None:
        self._policy, self._limit, self._seed, self._rank = policy, limit, seed, rank
        self.ends_run = policy == "fail"
        """Whether one image that cannot be read ends the run."""
        self._seen: set[str] = set()
        self.num_replaced = 0
        """How often an image was not given, since this object was made."""

    def replace(self, request: Request, unreadable: Mapping[int, str], draw: Callable[[int, Ints], Request]) -> Request:
        """`request` with others in the place of the unreadable: which, is a function of seed, epoch and sample.

        Args:
            request: of training.
            unreadable: position in the batch -> reason.
            draw: the request for an epoch and samples, with their windows and flips.

        Raises:
            ValueError: by policy, or past the limit.
        """
        self._allow(request, unreadable)
        asked = request.samples if request.asked is None else request.asked
        samples, num_images = request.samples.copy(), len(request.images)
        for position in unreadable:
            if request.num_mends == _MOST_ATTEMPTS:
                raise ValueError(
                    f"none of {_MOST_ATTEMPTS} others can be decoded in the place of {request.path(position)}"
                )
            samples[position] = substitute(
                self._seed, request.epoch, int(asked[position]), request.num_mends, num_images
            )
            self._say(request, position, unreadable[position], f"replaced by {request.images.path(samples[position])}")
        self.num_replaced += len(unreadable)
        return draw(request.epoch, samples)._replace(asked=asked, num_mends=request.num_mends + 1)

    def leave_out(self, request: Request, unreadable: Mapping[int, str]) -> Request:
        """`request` without the unreadable: validation is of the other images, each once.

        Raises:
            ValueError: by policy, or past the limit.
        """
        self._allow(request, unreadable)
        for position, reason in unreadable.items():
            self._say(request, position, reason, "left out of validation")
        self.num_replaced += len(unreadable)
        return request.without(list(unreadable))

    def _allow(self, request: Request, unreadable: Mapping[int, str]) -> None:
        position, reason = next(iter(unreadable.items()))
        path = request.path(position)
        if self._policy == "fail":
            raise ValueError(
                f"the image {path} cannot be decoded ({reason}); replace the file, list all such with bitfleet data verify, or "
                "go on without it: --data.on_bad_sample replace"
            )
        new = {request.path(position) for position in unreadable} - self._seen
        if len(self._seen) + len(new) > self._limit:
            raise ValueError(
                f"more than data.max_bad_samples={self._limit} images cannot be decoded, the last of them {path} ({reason}): "
                "look after the disk, or list them with bitfleet data verify"
            )

    def _say(self, request: Request, position: int, reason: str, done: str) -> None:
        path = request.path(position)
        if path not in self._seen:
            self._seen.add(path)
            print(
                f"bitfleet: rank {self._rank}: the image {path} cannot be decoded ({reason}); {done} "
                f"({len(self._seen)} of at most {self._limit})",
                file=sys.stderr,
                flush=True,
            )
