"""Runs on every rank: the diagnostics of bits, summed over the ranks, against counts over the weights of a plain optimizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.diagnostics import RATIOS, WINDOW, BitDiagnostics
from bitfleet.optim.kernels.bits import pack_signs
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.ranks.collectives import sum_over_ranks_

NUM_STEPS = WINDOW + 30
SAVED_AT = WINDOW - 20


def check_diagnostics(
    mine: list[nn.Parameter],
    theirs: list[nn.Parameter],
    make_plain: Callable[[list[nn.Parameter]], RoutedOptimizer],
    take_step: Callable[[int, ShardedOptimizer, RoutedOptimizer], None],
    folder: Path,
) -> None:
    """Train both; at step SAVED_AT the history goes through files, spoilt meanwhile, and is whole there.

    Args:
        mine: parameters of the sharded optimizer.
        theirs: the same, of the plain one.
        make_plain: makes both optimizers; the first group is binary.
        take_step: one step of both with equal gradients.
        folder: the same on every rank.
    """
    sharded, plain = ShardedOptimizer(make_plain(mine), bucket_numel=100), make_plain(theirs)
    diagnostics = BitDiagnostics(sharded)
    binary = dict(zip(plain.param_groups[0]["param_names"], plain.param_groups[0]["params"], strict=True))
    flips: dict[str, list[Tensor]] = {name: [] for name in binary}
    for step in range(1, NUM_STEPS + 1):
        before = {name: param.detach().clone() for name, param in binary.items()}
        diagnostics.wanted = step in (1, SAVED_AT + 1, NUM_STEPS)
        is_wanted = diagnostics.wanted
        take_step(step, sharded, plain)
        for name, param in binary.items():
            flips[name].append((before[name] != param.detach()).reshape(-1))
        if is_wanted:
            found = diagnostics.values(sum_over_ranks_(diagnostics.take()).tolist())
            check_values(found, binary, flips, plain)
        if step == SAVED_AT:
            through_files(diagnostics, flips, folder)
    sharded.close()


def check_values(
    found: dict[str, Any], binary: dict[str, nn.Parameter], flips: dict[str, list[Tensor]], plain: RoutedOptimizer
) -> None:
    """Every number of every parameter, from whole tensors."""
    group = plain.param_groups[0]
    ratios = {name: RATIOS[group["rule"]](plain.state[param], group).abs() for name, param in binary.items()}
    sizes = {name: param.numel() for name, param in binary.items()}
    counts = {
        "flip_ratio": {name: int(each[-1].sum()) for name, each in flips.items()},
        "never_flipped": {name: int((~torch.stack(each).any(0)).sum()) for name, each in flips.items()},
        "dead_band": {name: int((ratio <= group["threshold"]).sum()) for name, ratio in ratios.items()},
    }
    if len(next(iter(flips.values()))) >= WINDOW:
        counts["oscillators"] = {
            name: int((torch.stack(each[:WINDOW]).sum(0) >= 4).sum()) for name, each in flips.items()
        }
    for key, column in counts.items():
        assert found[key] == sum(column.values()) / sum(sizes.values()), key
        for name, count in column.items():
            assert found[f"{key}/{name}"] == count / sizes[name], (key, name)
    assert ("oscillators" in found) == ("oscillators" in counts)
    assert sum(found["log_ratio"]["counts"]) == sum(sizes.values())
    assert 0.0 < found["sign_agreement"] <= 1.0


def through_files(diagnostics: BitDiagnostics, flips: dict[str, list[Tensor]], folder: Path) -> None:
    """Write, spoil, read; what is in the files does not depend on the ranks."""
    group = dist.group.WORLD
    place = folder / "diagnostics"
    if dist.get_rank() == 0:
        place.mkdir()
    dist.barrier()
    targets = checkpoint_tensors.diagnostics_targets(diagnostics)
    checkpoint_tensors.write(targets, place, group)
    for tensor in targets.values():
        tensor.fill_(255)
    checkpoint_tensors.read_into(checkpoint_tensors.diagnostics_targets(diagnostics), place, group)
    diagnostics.begin(0)
    whole = checkpoint_tensors.read(place, checkpoint_tensors.DIAGNOSTICS)
    for name, each in flips.items():
        seen = torch.stack(each)
        total = seen.sum(0)
        assert torch.equal(whole[f"diagnostics.flipped.{name}"], packed(seen.any(0)))
        assert torch.equal(whole[f"diagnostics.ones.{name}"], packed(total % 2 == 1))
        assert torch.equal(whole[f"diagnostics.twos.{name}"], packed(total // 2 % 2 == 1))
        assert torch.equal(whole[f"diagnostics.fours.{name}"], packed(total >= 4))


def packed(flags: Tensor) -> Tensor:
    padded = torch.full((-(-len(flags) // 8) * 8,), -1.0)
    padded[: len(flags)] = flags.float() * 2 - 1
    return pack_signs(padded)
