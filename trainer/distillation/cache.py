"""Keep the teacher's logits on disk: write them per epoch, check them, and read them in a run.

    resnet34-seed0-0123456789ab/
        manifest.json             what the logits belong to, and the sizes below
        epoch-00003.json          file -> sha256, of the shards that are written
        epoch-00003-00000.npy     float16 [rows, classes]

A folder may hold the logits for many runs, as for the seeds of a sweep: each finds its own.
Row i of an epoch belongs to the i-th sample of its order (trainer/data/sampler.py): crops are a
function of seed, epoch and sample, so they are known before the run. The teacher is called for the
micro-batches of the run, since a convolution rounds differently for another number of images.
"""

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitfleet.trainer.run.files import locked, write_atomically
from bitfleet.trainer.run.strict_json import to_json

MANIFEST = "manifest.json"
FORMAT = 1
WEIGHTS = "weights (sha256)"
"""Part of the identity that a run does not know if the weights are timm's."""
SHARD_BYTES = 32 << 20
"""Size of a shard, about: what a killed `bitfleet data teach` repeats."""
Logits = npt.NDArray[np.float16]


class Layout(NamedTuple):
    """Sizes of a cache."""

    num_classes: int
    micro_batch_size: int
    rows_per_epoch: int
    """Whole micro-batches of the training set."""
    rows_per_shard: int
    """A multiple of micro_batch_size."""

    @property
    def num_shards(self) -> int:
        """Shards per epoch."""
        return math.ceil(self.rows_per_epoch / self.rows_per_shard)

    @property
    def bytes_per_epoch(self) -> int:
        """Bytes of the logits of an epoch."""
        return 2 * self.num_classes * self.rows_per_epoch

    def rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard; the last may have fewer."""
        return min(self.rows_per_shard, self.rows_per_epoch - shard * self.rows_per_shard)


def layout_for(num_images: int, num_classes: int, micro_batch_size: int) -> Layout:
    """Return the sizes of a cache that does not exist yet."""
    batches_per_shard = max(1, SHARD_BYTES // (2 * num_classes * micro_batch_size))
    rows = num_images // micro_batch_size * micro_batch_size
    return Layout(num_classes, micro_batch_size, rows, batches_per_shard * micro_batch_size)


class LogitCache:
    """A folder of logits.

    Args:
        folder: with a manifest, see `create` and `open_cache`.
        layout: from the manifest.
        weights_sha256: of the teacher's weights, from the manifest.
    """

    def __init__(self, folder: Path, layout: Layout, weights_sha256: str) -> None:
        self.folder, self.layout, self.weights_sha256 = folder, layout, weights_sha256

    def write_epoch(self, epoch: int, call: Callable[[int], Iterator[Tensor]]) -> int:
        """Write the shards of an epoch that are missing or damaged, and return their rows.

        Another process that writes the same epoch is waited for.

        Args:
            epoch: counted from 0.
            call: returns the logits, float16 [micro_batch_size, classes] on any device, of the
                micro-batches from a row of the epoch on.

        Raises:
            ValueError: logits that are not finite, or the folder cannot be written.
        """
        with locked(self.folder / f".lock-{epoch:05d}"):
            written = self._written(epoch)
            stream: Iterator[Tensor] = iter(())
            at, num_rows = -1, 0
            for shard in range(self.layout.num_shards):
                if self._is_intact(epoch, shard, written):
                    continue
                if at != shard:
                    stream = call(shard * self.layout.rows_per_shard)
                content = self._shard(stream, epoch, shard)
                name = _shard_name(epoch, shard)
                written[name] = hashlib.sha256(content).hexdigest()
                with _named(self.folder):
                    write_atomically(self.folder / name, content)
                    write_atomically(self.folder / _index_name(epoch), to_json(written, indent=1) + "\n")
                at, num_rows = shard + 1, num_rows + self.layout.rows_of(shard)
        return num_rows

    def _shard(self, stream: Iterator[Tensor], epoch: int, shard: int) -> bytes:
        num_rows, size = self.layout.rows_of(shard), self.layout.micro_batch_size
        rows = torch.cat([next(stream).cpu() for _ in range(num_rows // size)])
        assert rows.shape == (num_rows, self.layout.num_classes), rows.shape
        if not bool(rows.isfinite().all()):
            raise ValueError(
                f"the teacher's logits of epoch {epoch} are not finite, or too large for fp16 (above 65,504): use "
                "another teacher"
            )
        content = io.BytesIO()
        np.save(content, rows.numpy())
        return content.getvalue()

    def _is_intact(self, epoch: int, shard: int, written: Mapping[str, str]) -> bool:
        name = _shard_name(epoch, shard)
        if name not in written or not (self.folder / name).is_file():
            return False
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest() == written[name]

    def _written(self, epoch: int) -> dict[str, str]:
        """Return the shards of an epoch: file -> sha256; a damaged list is empty."""
        try:
            written = json.loads((self.folder / _index_name(epoch)).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return written if isinstance(written, dict) else {}

    def has(self, epoch: int) -> bool:
        """Return True if all shards of an epoch are written."""
        names = {_shard_name(epoch, shard) for shard in range(self.layout.num_shards)}
        return names <= self._written(epoch).keys() and all((self.folder / name).is_file() for name in names)

    def check_has(self, epochs: Collection[int]) -> None:
        """Raise ValueError, naming the first and the last missing epoch, unless all are there."""
        if missing := [epoch for epoch in epochs if not self.has(epoch)]:
            first, last = missing[0], missing[-1]
            named = f"epoch {first} is" if first == last else f"{len(missing):,} epochs from {first} to {last} are"
            raise ValueError(
                f"{named} missing in the teacher's logits {self.folder} (distill.cache; epochs count from 0): write "
                f"them with bitfleet data teach --first_epoch {first} --last_epoch {last} and the options of the run"
            )

    def read(self, epoch: int, shard: int) -> Logits:
        """Return a shard.

        Raises:
            ValueError: it is damaged or cannot be read.
        """
        path = self.folder / _shard_name(epoch, shard)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"the teacher's logits {path} cannot be read ({error.strerror}): {_REPAIR}") from error
        if hashlib.sha256(content).hexdigest() != self._written(epoch).get(path.name):
            raise ValueError(f"the teacher's logits {path} are damaged (their sha256 differs): {_REPAIR}")
        logits: Logits = np.load(io.BytesIO(content), allow_pickle=False)
        return logits


_REPAIR = "run bitfleet data teach again, which repairs them"


def _shard_name(epoch: int, shard: int) -> str:
    return f"epoch-{epoch:05d}-{shard:05d}.npy"


def _index_name(epoch: int) -> str:
    return f"epoch-{epoch:05d}.json"


def identity_of_logits(
    *,
    teacher: str,
    from_file: bool,
    weights_sha256: str | None,
    num_classes: int,
    precision: str,
    seed: int,
    data_sha: str,
    images: Mapping[str, Any],
    micro_batch_size: int,
) -> dict[str, Any]:
    """Return what decides the logits: name -> value.

    Args:
        teacher: name of the network.
        from_file: its weights come from a file, not from timm.
        weights_sha256: of its weights; None if they are timm's and were not loaded.
        num_classes: of both networks.
        precision: that the teacher computes in.
        seed: of order and crops.
        data_sha: sha256 of the lists of images.
        images: settings of the training images, field of `data` -> value, as JSON types.
        micro_batch_size: images per call of the teacher.
    """
    weights = {} if weights_sha256 is None else {WEIGHTS: weights_sha256}
    return {
        "teacher": teacher,
        "weights": "from a file" if from_file else "timm's",
        **weights,
        "num_classes": num_classes,
        "precision": precision,
        "seed": seed,
        "data (sha256)": data_sha,
        **{f"data.{name}": value for name, value in images.items()},
        "micro-batch size (global_batch_size / num_replicas)": micro_batch_size,
    }


def create(root: Path, identity: Mapping[str, Any], layout: Layout, facts: Mapping[str, Any]) -> LogitCache:
    """Start a cache below `root`, or open the one that is there.

    Args:
        root: made if missing.
        identity: with the sha256 of the weights.
        layout: used for a new cache.
        facts: further entries of the manifest of a new cache.

    Raises:
        ValueError: it cannot be written, or its manifest is damaged.
    """
    hashed = hashlib.sha256(to_json(identity).encode()).hexdigest()
    folder = root / f"{identity['teacher']}-seed{identity['seed']}-{hashed[:12]}"
    with _named(root):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            if not (folder / MANIFEST).exists():
                content = {"format": FORMAT, "identity": dict(identity), "layout": layout._asdict(), **facts}
                write_atomically(folder / MANIFEST, to_json(content, indent=1) + "\n")
    return open_cache(root, identity)


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the teacher's logits cannot be written into {folder} ({error.strerror}): make room, or choose another "
            "--distill.cache; the same command continues"
        ) from error


def open_cache(root: Path, identity: Mapping[str, Any]) -> LogitCache:
    """Open the cache below `root` that was made for `identity`.

    Raises:
        ValueError: there is none: the first difference to the most similar one is named.
    """
    wanted = json.loads(to_json(identity))
    differing: list[tuple[list[str], Path, dict[str, Any]]] = []
    for file in sorted(root.glob(f"*/{MANIFEST}")):
        made_for, layout = _read_manifest(file)
        differences = [
            name for name in {**wanted, **made_for} if name != WEIGHTS and made_for.get(name) != wanted.get(name)
        ]
        if WEIGHTS in wanted and made_for[WEIGHTS] != wanted[WEIGHTS]:
            differences.append(WEIGHTS)
        if not differences:
            return LogitCache(file.parent, layout, made_for[WEIGHTS])
        differing.append((differences, file.parent, made_for))
    if not differing:
        raise ValueError(
            f"there are no logits of a teacher in {root} (distill.cache): write them with bitfleet data teach and the "
            "options of the run, or leave distill.cache out"
        )
    (name, *_), folder, made_for = min(differing, key=lambda each: len(each[0]))
    there, here = (str(each.get(name, "missing"))[:40] for each in (made_for, wanted))
    raise ValueError(
        f"the teacher's logits in {folder} (distill.cache) were made for something else: {name} is {there} there and "
        f"{here} in this run; write those of this run with bitfleet data teach, or leave distill.cache out"
    )


def _read_manifest(file: Path) -> tuple[dict[str, Any], Layout]:
    try:
        manifest = json.loads(file.read_bytes())
        version, made_for, layout = manifest["format"], manifest["identity"], Layout(**manifest["layout"])
        assert WEIGHTS in made_for
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove its folder, and write the logits again") from error
    if version != FORMAT:
        raise ValueError(
            f"{file} has format {version}, and this bitfleet reads {FORMAT}: remove its folder, and write the logits "
            "again"
        )
    return made_for, layout


class Position(NamedTuple):
    """Place of a micro-batch in a cache."""

    epoch: int
    row: int
    """First row."""


def positions(
    *,
    start_step: int,
    steps_per_epoch: int,
    global_batch_size: int,
    num_replicas: int,
    rank: int,
    world_size: int,
) -> Iterator[Position]:
    """Yield the places of a rank's micro-batches from an optimizer step on, endlessly, in the order
    of `sampler.micro_batches`."""
    size, replicas = global_batch_size // num_replicas, num_replicas // world_size
    epoch, first = divmod(start_step, steps_per_epoch)
    while True:
        for step in range(first, steps_per_epoch):
            for replica in range(rank * replicas, (rank + 1) * replicas):
                yield Position(epoch, step * global_batch_size + replica * size)
        epoch, first = epoch + 1, 0


class CachedLogits:
    """Reads the logits of a rank's micro-batches in order, a shard ahead.

    Args:
        cache: of the run.
        device: where the logits go.
        last_epoch: the last one that is read.
        rows_per_epoch: rows of an epoch that the run reads.
    """

    def __init__(self, cache: LogitCache, device: torch.device, *, last_epoch: int, rows_per_epoch: int) -> None:
        self._cache, self._device, self._last_epoch = cache, device, last_epoch
        self._num_shards = math.ceil(rows_per_epoch / cache.layout.rows_per_shard)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-logits")
        self._place = (-1, -1)
        self._current = torch.empty(0)
        self._next: tuple[tuple[int, int], Future[Logits]] | None = None

    def at(self, position: Position) -> Tensor:
        """Return the logits of a micro-batch, float16 [micro_batch_size, classes].

        Raises:
            ValueError: a shard is missing or damaged.
        """
        layout = self._cache.layout
        shard, row = divmod(position.row, layout.rows_per_shard)
        if self._place != (position.epoch, shard):
            self._enter(position.epoch, shard)
        logits = self._current[row : row + layout.micro_batch_size]
        if self._device.type == "cpu":
            return logits
        return logits.pin_memory().to(self._device, non_blocking=True)  # without waiting for the device

    def _enter(self, epoch: int, shard: int) -> None:
        if self._next is not None and self._next[0] == (epoch, shard):
            logits = self._next[1].result()
        else:
            logits = self._cache.read(epoch, shard)
        self._place, self._current = (epoch, shard), torch.from_numpy(logits)
        following = (epoch, shard + 1) if shard + 1 < self._num_shards else (epoch + 1, 0)
        self._next = None
        if following[0] <= self._last_epoch:
            self._next = following, self._reader.submit(self._cache.read, *following)
