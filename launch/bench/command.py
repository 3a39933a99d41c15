"""Bench: `deepspeed --num_accelerators 2 --module bitfleet.launch bench NAME ...`, on one rank `bitfleet bench NAME ...`."""

import statistics
from collections.abc import Callable, Sequence

from bitfleet.launch.job import is_first_rank, job, num_cores
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.parsing.options import take_flag, take_number, take_option
from bitfleet.trainer.run.user_paths import users_path

USAGE = """usage: bitfleet bench NAME [options], on several ranks
       deepspeed --num_accelerators 2 --module bitfleet.launch bench NAME [options]

  train   --config NAME [--rounds 5] [--steps 40] [--section.field value ...]
          the step loop against a bare torch loop of the same network with its data in memory: images/s and their ratio
  comm    [--steps 5]
          bytes that a rank sends per step: bitfleet's sharding, ZeRO-0, 1, 2 and DistributedDataParallel
          (the wire: only in a network namespace of its own; of several hosts: launch/cluster/hosts.sh)
  step    [--rounds 7]
          the update of 12 and 62 million weights against fused AdamW and the limits of memory, one process: ns a weight
  networks [--network NAME] [--precision fp32|tf32|bf16|fp16] [--compiled] [--rounds 5] [--steps 2] [--batch_size N]
          training steps of birealnet18 (or NAME: xnornet, binarynet, any of timm's) against timm's resnet18 on the same images,
          one process: images/s, their ratio, and on a GPU the peak memory; eager, with --compiled also compiled (a minute each)
  sharding [--network NAME] [--contender NAME,...] [--micro_batch_size 8] [--rounds 5] [--steps 3]
          step time of birealnet18 and xnornet (or of NAME alone): bitfleet's sharding, DistributedDataParallel, ZeRO-1; and the
          bytes that a rank sent, which are only this job's in a network namespace (launch/cluster/hosts.sh). With --contender
          bits,DDP those alone (bits, DDP, zero1), for machines whose memory does not hold three of a network
  plan    --config NAME [--rates FILE] [--output FILE] [--rounds 5] [--steps 10] [--section.field value ...]
          rates of this machine, written to FILE for `bitfleet plan --rates FILE`, and in turns with them training steps: ms that
          the plan predicts (with FILE of --rates instead, where it is given), ms measured, and their ratio
  diagnostics --config NAME [--rounds 5] [--steps 20] [--section.field value ...]
          the whole training loop with metrics.diagnostics against the same without: ms a step and their ratio
  memory  [--steps 5]
          bytes of tensors per parameter that a rank holds after the step and at its peak, for the same
  checkpoint [--network xnornet] [--rounds 3] [--folder runs]
          what a save costs, in a new folder below --folder: bitfleet's in the background and blocking, ZeRO-1's, torch.save:
          stall, seconds until it is on disk, MB; XNOR-Net takes 4 GB of disk (also --network birealnet18, birealnet_small)
  journal --config NAME [--rounds 5] [--steps 20] [--section.field value ...]
          training steps with and without the flip journal in turns, bytes a step; and the encoding of made-up flips
  loader  [--root FOLDER] [--images 512] [--rounds 5] [--batch_size 64] [--num_workers CORES]
          ImageNet's training transform on the CPU, the same files for all: bitfleet, torchvision, timm, and WebDataset and FFCV
          where they are installed (pip install 'bitfleet[bench]'): images/s and CPU ms for an image; also the decoder and the
          sampler alone, and files of 256 pixels. Without --root on made-up photos, which the cache folder keeps
  loader --memory [--images 5000] [--rounds 5] [--batch_size 50] [--num_workers CORES]
          instead: images/s and CPU us for an image of 32 pixels with data.loader dali, torch and memory, in turns
  loader --manifest [--rounds 5] [--num_workers CORES]
          instead: seconds to the first batch and memory with a made-up manifest of ImageNet's length, in new processes
  gpu     [--seconds 600] [--output FILE.jsonl] [--only PART ...] [--tiny] [--cifar ROOT] [--imagenet ROOT]
          what one GPU should show, against its targets (docs/gpu.md): bits against the CPU's, the update, networks, host syncs,
          repeatability, the trainer, BinaryNet on CIFAR-10 (class folders in ROOT), DALI (photos in ROOT, or made-up ones).
          Parts: probe rule gradients update networks repeat trainer cifar dali; what no longer fits into the seconds is
          skipped. Each result is a line of FILE at once. --tiny: a dry run of every part in a minute or two, on a CPU too"""


def bench(arguments: Sequence[str]) -> None:
    """Run the benchmark that `arguments` name.

    Raises:
        ValueError: bad input.
    """
    own = [a for a in arguments if not a.startswith("--local_rank=")]
    if not own or own[0] in ("-h", "--help"):
        print(USAGE)
        return
    name, *rest = own
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    BENCHMARKS[name](rest)


def _train(arguments: list[str]) -> None:
    rounds, arguments = take_number(arguments, "--rounds", 5)
    steps, arguments = take_number(arguments, "--steps", 40)
    config = parse_train(arguments, "bitfleet bench train")
    with job(config.device, config) as (ranks, device):
        from bitfleet.launch.bench.train import bench_train

        result = bench_train(config, ranks, device, num_rounds=rounds, num_steps=steps)
    if is_first_rank():
        print(
            f"{config.name} on {ranks.world_size} ranks ({device.type}), images/s, median of {len(result.bare)} rounds"
        )
        print(f"  bitfleet         {statistics.median(result.bitfleet):10,.0f}")
        print(f"  bare torch loop  {statistics.median(result.bare):10,.0f}")
        print(f"  ratio            {result.ratio:10.3f}")


def _comm(arguments: list[str]) -> None:
    steps, arguments = take_number(arguments, "--steps", 5)
    _reject(arguments, "comm")
    with job("auto") as (ranks, device):
        from bitfleet.launch.bench.comm import bench_comm, format_comm

        rows = bench_comm(ranks, device, num_steps=steps)
    if is_first_rank():
        print(format_comm(rows, ranks))


def _plan(arguments: list[str]) -> None:
    rounds, arguments = take_number(arguments, "--rounds", 5)
    steps, arguments = take_number(arguments, "--steps", 10)
    file, arguments = take_option(arguments, "--rates")
    output, arguments = take_option(arguments, "--output")
    config = parse_train(arguments, "bitfleet bench plan")
    from bitfleet.launch.plan.rates import read_rates, write_rates

    given = read_rates(users_path(file)) if file else None
    with job(config.device, config) as (ranks, device):
        from bitfleet.launch.bench.rates import bench_plan, format_check

        check = bench_plan(config, given, ranks, device, num_rounds=rounds, num_steps=steps)
    if is_first_rank():
        print(format_check(config, ranks, check))
        if output:
            write_rates(check.rates, users_path(output))
            print(f"rates written to {output}")


def _diagnostics(arguments: list[str]) -> None:
    rounds, arguments = take_number(arguments, "--rounds", 5)
    steps, arguments = take_number(arguments, "--steps", 20)
    config = parse_train(arguments, "bitfleet bench diagnostics")
    with job(config.device, config) as (ranks, device):
        from bitfleet.launch.bench.diagnostics import bench_diagnostics, format_diagnostics

        cost = bench_diagnostics(config, ranks, device, num_rounds=rounds, num_steps=steps)
    if is_first_rank():
        print(format_diagnostics(config, ranks, cost))


def _memory(arguments: list[str]) -> None:
    steps, arguments = take_number(arguments, "--steps", 5)
    _reject(arguments, "memory")
    with job("auto") as (ranks, device):
        from bitfleet.launch.bench.memory import bench_memory, format_memory

        rows = bench_memory(ranks, device, num_steps=steps)
    if is_first_rank():
        print(format_memory(rows, ranks))


def _step(arguments: list[str]) -> None:
    rounds, arguments = take_number(arguments, "--rounds", 7)
    _reject(arguments, "step")
    from bitfleet.launch.bench.step import bench_step, first_steps, format_steps

    if is_first_rank():  # one process measures
        print(format_steps(bench_step(num_rounds=rounds), first_steps()))


def _networks(arguments: list[str]) -> None:
    rounds, arguments = take_number(arguments, "--rounds", 5)
    steps, arguments = take_number(arguments, "--steps", 2)
    batch_size, arguments = take_number(arguments, "--batch_size", 0)
    network, arguments = take_option(arguments, "--network")
    precision, arguments = take_option(arguments, "--precision")
    compiled, arguments = take_flag(arguments, "--compiled")
    _reject(arguments, "networks")
    with job("auto") as (ranks, device):
        from bitfleet.launch.bench.networks import bench_networks, format_networks
        from bitfleet.launch.bench.precision import PRECISIONS

        if ranks.world_size > 1:
            raise ValueError(f"bench networks measures one process, but there are {ranks.world_size} ranks: start one")
        wanted = [
            each for each in PRECISIONS if each == (precision or each) and (precision or each in ("fp32", "bf16"))
        ]
        if not wanted:
            raise ValueError(f"bench networks knows the precisions {', '.join(PRECISIONS)}, not {precision!r}")
        for each in wanted:
            rows = bench_networks(
                network or "birealnet18",
                each,
                device,
                compiled=compiled,
                num_rounds=rounds,
                num_steps=steps,
                batch_size=batch_size or None,
            )
            print(format_networks(rows, device), flush=True)


def _sharding(arguments: list[str]) -> None:
    micro_batch_size, arguments = take_number(arguments, "--micro_batch_size", 8)
    rounds, arguments = take_number(arguments, "--rounds", 5)
    steps, arguments = take_number(arguments, "--steps", 3)
    only, arguments = take_option(arguments, "--network")
    contender, arguments = take_option(arguments, "--contender")
    _reject(arguments, "sharding")
    from bitfleet.launch.bench.sharding import CONTENDERS, NETWORKS, bench_sharding, format_sharding

    if only is not None and only not in NETWORKS:
        raise ValueError(f"bench sharding knows the networks {', '.join(NETWORKS)}, not {only!r}")
    contenders = contender.split(",") if contender else list(CONTENDERS)
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise ValueError(f"bench sharding knows the contenders {', '.join(CONTENDERS)}, not {unknown[0]!r}")
    with job("auto") as (ranks, device):
        for network in [only] if only else NETWORKS:
            rounds_measured = bench_sharding(
                network,
                ranks,
                device,
                micro_batch_size=micro_batch_size,
                num_rounds=rounds,
                num_steps=steps,
                contenders=contenders,
            )
            if is_first_rank():
                print(format_sharding(network, ranks, micro_batch_size, rounds_measured), flush=True)


def _checkpoint(arguments: list[str]) -> None:
    rounds, arguments = take_number(arguments, "--rounds", 3)
    network, arguments = take_option(arguments, "--network")
    folder, arguments = take_option(arguments, "--folder")
    _reject(arguments, "checkpoint")
    network = network or "xnornet"
    with job("auto") as (ranks, device):
        from bitfleet.launch.bench.checkpoint import bench_checkpoint
        from bitfleet.launch.bench.checkpoint_table import format_checkpoint

        result = bench_checkpoint(network, ranks, device, users_path(folder or "runs"), num_rounds=rounds)
    if is_first_rank():
        print(format_checkpoint(network, ranks, result))


def _journal(arguments: list[str]) -> None:
    rounds, arguments = take_number(arguments, "--rounds", 5)
    steps, arguments = take_number(arguments, "--steps", 20)
    config = parse_train(arguments, "bitfleet bench journal")
    with job(config.device, config) as (ranks, device):
        from bitfleet.launch.bench.journal import bench_journal, encodings, format_journal

        cost = bench_journal(config, ranks, device, num_rounds=rounds, num_steps=steps)
    if is_first_rank():
        print(format_journal(config.name, ranks, cost, encodings()))


def _loader(arguments: list[str]) -> None:
    from bitfleet.launch.bench.loader import bench_loader
    from bitfleet.launch.bench.loader_manifest import bench_manifest, format_manifest
    from bitfleet.launch.bench.loader_table import format_loader

    rounds, arguments = take_number(arguments, "--rounds", 5)
    workers, arguments = take_number(arguments, "--num_workers", num_cores())
    if "--manifest" in arguments:
        arguments.remove("--manifest")
        _reject(arguments, "loader --manifest")
        if is_first_rank():  # one process measures
            print(format_manifest(bench_manifest(num_rounds=rounds, num_workers=workers)))
        return
    in_memory = "--memory" in arguments
    if in_memory:
        arguments.remove("--memory")
    images, arguments = take_number(arguments, "--images", 5000 if in_memory else 512)
    batch_size, arguments = take_number(arguments, "--batch_size", 50 if in_memory else 64)
    if in_memory:
        from bitfleet.launch.bench.loader_memory import bench_small_images, format_small_images

        _reject(arguments, "loader --memory")
        if is_first_rank():
            small = bench_small_images(num_images=images, num_rounds=rounds, batch_size=batch_size, num_workers=workers)
            print(format_small_images(small))
        return
    root, arguments = take_option(arguments, "--root")
    root = str(users_path(root)) if root else root
    _reject(arguments, "loader")
    if is_first_rank():
        result = bench_loader(root, num_images=images, num_rounds=rounds, batch_size=batch_size, num_workers=workers)
        print(format_loader(result))


def _gpu(arguments: list[str]) -> None:
    from bitfleet.launch.bench.gpu.command import bench_gpu

    if is_first_rank():  # each part is a process of its own
        bench_gpu(arguments)


BENCHMARKS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "comm": _comm,
    "plan": _plan,
    "diagnostics": _diagnostics,
    "memory": _memory,
    "step": _step,
    "networks": _networks,
    "sharding": _sharding,
    "checkpoint": _checkpoint,
    "journal": _journal,
    "loader": _loader,
    "gpu": _gpu,
}


def _reject(arguments: Sequence[str], name: str) -> None:
    if arguments:
        raise ValueError(f"bench {name} has no option {arguments[0]!r}; `bitfleet bench --help` lists them")
