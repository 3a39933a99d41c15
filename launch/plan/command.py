"""Plan: `bitfleet plan --nodes 8 --gpus 8 --network 400 --gpu h100 --config NAME [--section.field value ...]`."""

from collections.abc import Sequence

from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.parsing.options import take_decimal, take_number, take_option
from bitfleet.trainer.run.user_paths import users_path

USAGE = """usage: bitfleet plan --config NAME [options] [--section.field value ...]

Predict what a step costs on a cluster, what binds it, how many nodes are worth having, and what a CUDA graph of the step saves.
Nothing is run: the kernels of a step are counted on tensors without memory.

  --nodes N        nodes (1)
  --gpus N         GPUs of a node; with rates of a CPU, the ranks on a node (8)
  --network GBIT   what the connection of a node carries each way, in Gbit/s, all its cards together; needed for several nodes
  --gpu NAME       whose published rates: a100, h100
  --rates FILE     instead: what `bench plan --config NAME --output FILE` measured on N ranks
  --cores N        CPU cores of a node, for decoding on the CPU (the GPU's usual host; with --rates, of the machine measured)
  --images N       training images of an epoch (those of data.root where it is here, else ImageNet's 1,281,167)
  --output FILE    draw it as well, a PNG"""


def plan(arguments: Sequence[str]) -> None:
    """Print the plan that `arguments` ask for.

    Raises:
        ValueError: bad input.
    """
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return
    num_nodes, rest = take_number(arguments, "--nodes", 1)
    ranks_per_node, rest = take_number(rest, "--gpus", 8)
    link_gbit, rest = take_decimal(rest, "--network")
    cores, rest = take_decimal(rest, "--cores")
    num_images, rest = take_decimal(rest, "--images")
    gpu, rest = take_option(rest, "--gpu")
    file, rest = take_option(rest, "--rates")
    output, rest = take_option(rest, "--output")
    if (gpu is None) == (file is None):
        raise ValueError("whose rates? Pass either --gpu NAME or --rates FILE")
    if link_gbit is None and num_nodes > 1:
        raise ValueError("how fast is the network? Pass --network, the Gbit/s of a node")
    config = parse_train(rest, "bitfleet plan")

    from bitfleet.launch.plan.plan import Cluster, all_modes, other_shardings, scan
    from bitfleet.launch.plan.rates import published, read_rates
    from bitfleet.launch.plan.table import format_plan
    from bitfleet.launch.plan.traffic import count_images, describe
    from bitfleet.trainer.engine.config import resolve_precision

    precision = resolve_precision(config.engine.precision, "cuda")
    rates = read_rates(users_path(file)) if file else published(gpu or "", precision, config.data.image_size)
    cluster = Cluster(
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        link_bytes_per_second=1e9 / 8 * (link_gbit or 1.0),
        cores=cores or rates.cores,
    )
    network = describe(config)
    estimates, shardings = scan(config, network, rates, cluster), other_shardings(config, network, rates, cluster)
    if link_gbit is None:
        estimates = estimates[:1]  # there is no network to say anything about
    number = int(num_images) if num_images else count_images(config.data)
    modes = all_modes(config, network, rates, cluster)
    print(format_plan(config, number, rates, cluster, estimates, shardings, modes))
    if output:
        from bitfleet.launch.plan.plot import plot_plan

        (asked,) = [e for e in estimates if e.num_nodes == num_nodes]
        plot_plan(config, number, estimates, asked, "GPU" if rates.device == "gpu" else "rank", users_path(output))
        print(f"\ndrawn in {output}")
