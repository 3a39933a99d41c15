"""What checkpoints cost, as numbers and as a table."""

import statistics
from typing import Literal, NamedTuple

from bitfleet.trainer.ranks.collectives import Ranks

Method = Literal["background", "blocking", "zero1", "torch.save"]
TITLES: dict[Method, str] = {
    "background": "Saver, in the background",
    "blocking": "Saver, blocking",
    "zero1": "DeepSpeed ZeRO-1 save_checkpoint",
    "torch.save": "torch.save on rank 0",
}


class Cost(NamedTuple):
    """Of one checkpoint, on the slowest rank."""

    stall_seconds: float
    """Until training may go on."""
    seconds: float
    """Until it is on disk, flushed; for the Saver hashed and committed as well."""
    num_bytes: int
    """All files of all ranks."""


class Result(NamedTuple):
    """What `bench_checkpoint` measures; a value a round, the first round (whose memory is new) apart."""

    first: dict[Method, Cost]
    costs: dict[Method, list[Cost]]
    during: list[tuple[float, float]]
    """(time of a training step while a checkpoint is written over that of one without, longest pause of an idle thread)."""
    tensor_bytes: int
    """What the Saver is given, over all ranks."""
    required_bytes: int
    """Moments and full-precision parameters alone."""


def format_checkpoint(network: str, ranks: Ranks, result: Result) -> str:
    """The table of one network, medians over the rounds, and the ratios that have a bound."""
    num_rounds = len(result.during)
    slow_down, pause = (statistics.median(values) for values in zip(*result.during, strict=True))
    lines = [
        f"{network}, {ranks.world_size} ranks, median of {num_rounds} rounds; moments and full-precision parameters: "
        f"{result.required_bytes / 1e6:,.3f} MB",
        f"  {'':34}{'stall s':>10}{'on disk s':>12}{'MB written':>14}{'MB/s per rank':>16}{'first stall s':>16}",
    ]
    for method, costs in result.costs.items():
        stall, seconds, num_bytes = (statistics.median(values) for values in zip(*costs, strict=True))
        rate = num_bytes / 1e6 / ranks.world_size / seconds
        first = result.first[method].stall_seconds
        lines.append(
            f"  {TITLES[method]:34}{stall:10.3f}{seconds:12.3f}{num_bytes / 1e6:14,.3f}{rate:16,.0f}{first:16.3f}"
        )
    pairs = zip(result.costs["background"], result.costs["blocking"], strict=True)
    ratio = statistics.median(behind.stall_seconds / blocking.stall_seconds for behind, blocking in pairs)
    written = result.costs["background"][0].num_bytes
    lines += [
        f"  stall, background / blocking                          {ratio:8.3f}  (at 500 MB and 2 ranks: at most 0.10)",
        f"  Saver's bytes / moments and full-precision parameters {written / result.required_bytes:8.4f}  (at most 1.02)",
        f"  Saver's bytes / bytes of its tensors                  {written / result.tensor_bytes:8.4f}",
        f"  training step during a save / without                 {slow_down:8.3f}",
        f"  longest pause of an idle thread during a save         {pause:8.3f}  s",
        "  A pause: something held the interpreter, or the cores were busy.",
        "  The Saver flushes (fsync), hashes and commits its files; the last ones were read again and are intact. The other two",
        "  return without fsync or hash: the benchmark flushes their files, which is in their seconds on disk, not in the stall.",
    ]
    return "\n".join(lines)
