"""`bitfleet plan`: predict what a training step costs on a cluster."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.parsing.commands import Count, MaybeCount, MaybeDecimal, parse_with_run


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predict the time of a step on a cluster, what binds it, and how many nodes are worth having.

    Nothing is run: bytes and operators are counted on tensors without memory. The options of the
    run follow: --config NAME [--section.field value ...].
    """

    nodes: Count = 1
    """Nodes."""
    gpus: Count = 8
    """GPUs per node; with rates of a CPU, ranks per node."""
    network: MaybeDecimal = None
    """Bandwidth of a node in each direction, Gbit/s, all its cards together; needed for several
    nodes."""
    gpu: str | None = None
    """GPU whose published rates to use: a100, h100."""
    rates: Path | None = None
    """Rates to use instead: the file of `bench plan --config NAME --output FILE` on N ranks."""
    cores: MaybeDecimal = None
    """CPU cores per node, for decoding on the CPU. Default: those of the GPU's usual host, or of
    the machine measured."""
    images: MaybeCount = None
    """Training images per epoch. Default: those of data.root if it is here, else ImageNet's
    1,281,167."""
    output: Path | None = None
    """PNG to draw."""


def plan(arguments: Sequence[str]) -> None:
    """Print the plan that `arguments` ask for.

    Raises:
        ValueError: bad input.
    """
    options: Plan
    options, rest = parse_with_run(Plan, arguments or ["--help"], "bitfleet plan")
    config = parse_train(rest, "bitfleet plan")
    if (options.gpu is None) == (options.rates is None):
        raise ValueError("whose rates? Pass either --gpu NAME or --rates FILE")
    if options.network is None and options.nodes > 1:
        raise ValueError("how fast is the network? Pass --network, the Gbit/s of a node")

    from bitfleet.launch.data.imagenet import ILSVRC2012
    from bitfleet.launch.plan.plan import Cluster, alternatives, scan
    from bitfleet.launch.plan.rates import published, read_rates
    from bitfleet.launch.plan.table import answer, draw_plan, format_plan
    from bitfleet.launch.plan.traffic import describe
    from bitfleet.trainer.data import open_dataset
    from bitfleet.trainer.engine.config import resolve_precision

    if options.rates:
        rates = read_rates(options.rates)
    else:
        rates = published(options.gpu or "", resolve_precision(config.engine.precision, "cuda"), config.data.image_size)
    cluster = Cluster(
        num_nodes=options.nodes,
        ranks_per_node=options.gpus,
        link_bytes_per_second=1e9 / 8 * (options.network or math.inf),
        cores=options.cores or rates.cores,
    )
    network = describe(config)
    estimates = scan(config, network, rates, cluster)
    others = alternatives(config, network, rates, cluster)
    if options.network is None:
        estimates = estimates[:1]  # nothing is known about several nodes
    num_images = options.images
    if num_images is None:
        try:
            num_images = len(open_dataset(config.data).train)
        except ValueError:
            num_images = ILSVRC2012.train
    if num_images < config.global_batch_size:
        raise ValueError(
            f"{num_images:,} training images do not fill a batch of {config.global_batch_size:,}: lower "
            "--global_batch_size, or pass the --images of an epoch"
        )
    print(format_plan(config, num_images, rates, cluster, estimates, others))
    if options.output:
        sentences = answer(config, num_images, estimates, cluster, "GPU" if rates.device == "gpu" else "rank")
        draw_plan("\n".join([config.name, *sentences]), estimates, options.output)
        print(f"\ndrawn in {options.output}")
