"""The diagnostics of bits, summed over the ranks, against counts over the weights of a plain
optimizer."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bitfleet.optim.diagnostics import WINDOW, BitDiagnostics
from bitfleet.optim.kernels.bits import pack_signs
from bitfleet.optim.schedules import constant
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.ranks.collectives import all_reduce_sum_
from tests.distributed.on_ranks.twins import EVERY_RULE, NUM_BINARY, Twins

NUM_STEPS = WINDOW + 30
SAVED_AT = WINDOW - 20
Flips = dict[str, list[Tensor]]


def test_counts_of_all_ranks_and_their_way_through_files(folder: Path) -> None:
    """At step SAVED_AT the history goes through files and is overwritten before it is read."""
    gamma, sigma, threshold = 0.05, 1e-3, 1e-1
    rates = {"gamma": constant(gamma), "sigma": constant(sigma), "threshold": constant(threshold)}
    twins = Twins(dataclasses.replace(EVERY_RULE["bop2ndorder-adam"], **rates), bucket_numel=1000)
    diagnostics = BitDiagnostics(twins.sharded)
    binary = {f"p{index}": param for index, param in enumerate(twins.theirs[:NUM_BINARY])}
    flips: Flips = {name: [] for name in binary}
    for step in range(1, NUM_STEPS + 1):
        before = {name: param.detach().clone() for name, param in binary.items()}
        diagnostics.wanted = is_wanted = step in (1, SAVED_AT + 1, NUM_STEPS)
        twins.step()
        for name, param in binary.items():
            flips[name].append((before[name] != param.detach()).reshape(-1))
        if is_wanted:
            values = diagnostics.values(all_reduce_sum_(diagnostics.take()).tolist())
            divisor, divisor_sq = 1 - (1 - gamma) ** step, 1 - (1 - sigma) ** step
            states = {name: twins.plain.state[param] for name, param in binary.items()}
            ratios = {
                name: (state["exp_avg"] / divisor).abs() / (state["exp_avg_sq"] / divisor_sq).sqrt()
                for name, state in states.items()
            }
            check_values(values, flips, {name: int((ratio <= threshold).sum()) for name, ratio in ratios.items()})
        if step == SAVED_AT:
            through_files(diagnostics, flips, folder / "diagnostics")
    twins.sharded.close()


def check_values(values: dict[str, Any], flips: Flips, dead_band: dict[str, int]) -> None:
    """Compare every number of every parameter with counts over whole tensors."""
    sizes = {name: len(history[0]) for name, history in flips.items()}
    counts = {
        "flip_ratio": {name: int(history[-1].sum()) for name, history in flips.items()},
        "never_flipped": {name: int((~torch.stack(history).any(0)).sum()) for name, history in flips.items()},
        "dead_band": dead_band,
    }
    if len(next(iter(flips.values()))) >= WINDOW:
        counts["oscillators"] = {
            name: int((torch.stack(history[:WINDOW]).sum(0) >= 4).sum()) for name, history in flips.items()
        }
    for key, column in counts.items():
        assert values[key] == sum(column.values()) / sum(sizes.values()), key
        for name, count in column.items():
            assert values[f"{key}/{name}"] == count / sizes[name], (key, name)
    assert ("oscillators" in values) == ("oscillators" in counts)
    assert sum(values["log_ratio"]["counts"]) == sum(sizes.values())
    assert 0.0 < values["sign_agreement"] <= 1.0


def through_files(diagnostics: BitDiagnostics, flips: Flips, folder: Path) -> None:
    """Write, overwrite, read; the files do not depend on the number of ranks."""
    group = dist.group.WORLD
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    targets = checkpoint_tensors.diagnostics_targets(diagnostics)
    checkpoint_tensors.write(targets, folder, group)
    for tensor in targets.values():
        tensor.fill_(255)
    checkpoint_tensors.read_into(checkpoint_tensors.diagnostics_targets(diagnostics), folder, group)
    diagnostics.begin(0)
    written = checkpoint_tensors.read(folder, checkpoint_tensors.DIAGNOSTICS)
    for name, history in flips.items():
        seen = torch.stack(history)
        total = seen.sum(0)
        assert torch.equal(written[f"diagnostics.flipped.{name}"], packed(seen.any(0)))
        assert torch.equal(written[f"diagnostics.ones.{name}"], packed(total % 2 == 1))
        assert torch.equal(written[f"diagnostics.twos.{name}"], packed(total // 2 % 2 == 1))
        assert torch.equal(written[f"diagnostics.fours.{name}"], packed(total >= 4))


def packed(flags: Tensor) -> Tensor:
    """Return the flags as bits, the last byte filled up with zeros."""
    padded = torch.full((-(-len(flags) // 8) * 8,), -1.0)
    padded[: len(flags)] = flags.float() * 2 - 1
    return pack_signs(padded)
