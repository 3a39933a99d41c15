"""The arithmetic of a plan: what hides behind what, what binds, and where more nodes stop to
help."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from torch import nn

from bitfleet.configs import load_config
from bitfleet.launch.plan.command import plan
from bitfleet.launch.plan.plan import (
    KERNELS_PER_STEP,
    KERNELS_PER_TENSOR,
    Cluster,
    Estimate,
    alternatives,
    efficiency_of,
    estimate,
    find_limit,
    scan,
)
from bitfleet.launch.plan.rates import GPUS, Rates, numbers, published, read_rates, write_rates
from bitfleet.launch.plan.traffic import Message, describe
from bitfleet.trainer.distillation import DistillConfig
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.journal import JournalConfig

XNOR = load_config("xnornet_imagenet")
SMALL = load_config("fashion_quickstart")


def rates(**changes: float | str) -> Rates:
    """A machine on which everything but what `changes` says takes next to no time."""
    values: dict[str, float | str] = {
        "name": "synthetic",
        "device": "gpu",
        "cores": 8.0,
        "flops_per_second": 1e30,
        "launch_seconds": 1e-30,
        "node_seconds": 1e-30,
        "whole_ns": 1e-30,
        "update_ns": 1e-30,
        "plain_update_ns": 1e-30,
        "decode_seconds": 1e-30,
        "core_decode_seconds": 1e-30,
        "local_bytes_per_second": 1e30,
        "latency_seconds": 1e-30,
        "link_efficiency": 1.0,
    }
    values |= changes
    return Rates(sources=dict.fromkeys(values, "synthetic"), **values)  # type: ignore[arg-type]


def cluster(num_nodes: int = 1, ranks_per_node: int = 8, link: float = 1e30, cores: float = 8.0) -> Cluster:
    return Cluster(num_nodes=num_nodes, ranks_per_node=ranks_per_node, link_bytes_per_second=link, cores=cores)


def test_a_gpu_hides_data_behind_compute() -> None:
    network = describe(XNOR)
    flops = 6 * network.macs * 128 / 0.020  # 20 ms for the 128 images of a rank
    for decode, step, binding in ((0.010, 0.020, "compute"), (0.030, 0.030, "data")):
        e = estimate(XNOR, network, rates(flops_per_second=flops, decode_seconds=decode / 128), cluster())
        assert (e.images_per_rank, e.world_size, e.binding) == (128, 8, binding)
        assert e.step == pytest.approx(step)
        assert e.data == pytest.approx(decode)
        assert e.images_per_second == pytest.approx(1024 / step)


def test_ranks_share_the_cores_of_a_cpu() -> None:
    network = describe(SMALL)
    cpu = rates(
        device="cpu", flops_per_second=6 * network.macs * 100, decode_seconds=1 / 200
    )  # a core: 100 and 200 images/s
    for ranks in (1, 2, 4):
        e = estimate(SMALL, network, cpu, cluster(ranks_per_node=ranks, cores=2))
        assert e.compute == pytest.approx(128 / (2 * 100))
        assert e.data == pytest.approx(128 / (2 * 200))
        assert e.step == pytest.approx(e.compute + e.data)
        assert e.binding == "compute"
    # What each rank does whatever its batch grows with the ranks.
    cpu = rates(device="cpu", launch_seconds=0.001 / network.num_operators)
    assert estimate(SMALL, network, cpu, cluster(ranks_per_node=4, cores=2)).step == pytest.approx(0.002)


def test_launches_bind_where_a_batch_is_small() -> None:
    network = describe(XNOR)
    num_kernels = network.num_operators + KERNELS_PER_TENSOR * len(network.ready) + KERNELS_PER_STEP
    # 512 images of a rank take 0.5 s, and so do the launches.
    gpu = rates(flops_per_second=6 * network.macs * 1024, launch_seconds=0.5 / num_kernels)
    few, many = (estimate(XNOR, network, gpu, cluster(ranks_per_node=number)) for number in (4, 1))
    assert (few.binding, many.binding) == ("launches", "compute")
    assert few.step == few.launches == pytest.approx(0.5)
    # Two micro-batches per rank are launched twice.
    twice = estimate(dataclasses.replace(XNOR, num_replicas=8), network, gpu, cluster(ranks_per_node=4))
    assert twice.launches == pytest.approx(0.5 * (1 + network.num_operators / num_kernels))


def test_a_teacher_adds_its_forward_pass() -> None:
    distill = DistillConfig(teacher="resnet34")
    config = dataclasses.replace(XNOR, distill=distill)
    network, cached = describe(config), dataclasses.replace(config, distill=dataclasses.replace(distill, cache=Path()))
    assert network.teacher.macs == pytest.approx(3.66e9, rel=0.01)  # published: 3.7 GMACs
    assert describe(XNOR).teacher == describe(cached).teacher == (0, 0)
    gpu = rates(flops_per_second=1e12)
    compute = estimate(config, network, gpu, cluster()).compute
    assert compute == pytest.approx(128 * (6 * network.macs + 2 * network.teacher.macs) / 1e12)
    assert estimate(cached, describe(cached), gpu, cluster()).compute == pytest.approx(128 * 6 * network.macs / 1e12)
    # Its kernels are launched one by one, also with a graph of the rest.
    graph = dataclasses.replace(config, engine=EngineConfig(cuda_graph=True))
    launches = estimate(graph, describe(graph), rates(launch_seconds=1.0), cluster()).launches
    assert launches == pytest.approx(network.teacher.num_operators)
    assert network.teacher.num_operators > 34


def test_operators_are_those_of_the_network() -> None:
    network = describe(SMALL)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.model.modules())
    assert network.num_operators > 2 * convolutions
    other = describe(dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, image_size=64)))
    assert other.num_operators == network.num_operators
    assert all(param.grad is None for param in network.model.parameters())


def test_what_a_cuda_graph_saves() -> None:
    network = describe(XNOR)
    gpu = rates(launch_seconds=1e-5, node_seconds=1e-6)
    host = estimate(XNOR, network, gpu, cluster(ranks_per_node=1))
    graph = alternatives(XNOR, network, gpu, cluster(ranks_per_node=1))["--engine.cuda_graph True"]
    assert (host.binding, graph.binding) == ("launches", "launches")
    assert graph.step == pytest.approx(host.step / 10)
    # A step that the device needs longer for is not shortened below that.
    slow = dataclasses.replace(gpu, flops_per_second=6 * network.macs * 1024 / 1e-3)
    graph = alternatives(XNOR, network, slow, cluster(ranks_per_node=1))["--engine.cuda_graph True"]
    assert graph.step == pytest.approx(1e-3)


def test_other_options_are_such_as_a_run_can_have() -> None:
    """A graph holds the step of one rank, and gradients travel in bf16 with sharding bits."""
    network = describe(SMALL)
    for sharding, num_ranks, names in (
        ("bits", 1, {"grad_comm_dtype bf16", "sharding none", "sharding zero1", "cuda_graph True"}),
        ("bits", 2, {"grad_comm_dtype bf16", "sharding none", "sharding zero1"}),
        ("zero1", 1, {"sharding none"}),
    ):
        config = dataclasses.replace(SMALL, engine=EngineConfig(sharding=sharding))  # type: ignore[arg-type]
        found = alternatives(config, network, rates(), cluster(ranks_per_node=num_ranks))
        assert {name.removeprefix("--engine.") for name in found} == names


def test_other_options_keep_what_else_the_run_has() -> None:
    one = cluster(ranks_per_node=1)
    # What travels is nothing on one rank, so bf16 changes nothing: the step stays a graph.
    graph, gpu = dataclasses.replace(SMALL, engine=EngineConfig(cuda_graph=True)), rates(launch_seconds=1e-5)
    network = describe(graph)
    found = alternatives(graph, network, gpu, one)
    assert found["--engine.grad_comm_dtype bf16"].step == estimate(graph, network, gpu, one).step
    assert "--engine.cuda_graph True" not in found
    # A graph does not hold the teacher.
    taught = dataclasses.replace(XNOR, distill=DistillConfig(teacher="resnet34"))
    captured = dataclasses.replace(taught, engine=EngineConfig(cuda_graph=True))
    network = describe(taught)
    found = alternatives(taught, network, gpu, one)
    assert found["--engine.cuda_graph True"] == estimate(captured, describe(captured), gpu, one)


def test_options_that_the_run_refuses_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """A journal needs sharding bits, and its flips are seen on the host."""
    journal = dataclasses.replace(SMALL, journal=JournalConfig(enabled=True))
    found = alternatives(journal, describe(journal), rates(), cluster(ranks_per_node=1))
    assert list(found) == ["--engine.grad_comm_dtype bf16"]
    bf16 = ["--journal.enabled", "True", "--engine.grad_comm_dtype", "bf16"]
    plan(["--gpu", "h100", "--gpus", "1", "--config", "fashion_quickstart", *bf16])
    assert "Other options" not in capsys.readouterr().out


def test_a_cpu_pays_launches_besides_the_update() -> None:
    network = describe(SMALL)
    e = estimate(SMALL, network, rates(device="cpu", launch_seconds=1e-6), cluster(ranks_per_node=1, cores=1))
    assert e.step == pytest.approx(1e-6 * network.num_operators)


def test_cores_that_decode_for_gpus_are_shared() -> None:
    config = dataclasses.replace(XNOR, data=dataclasses.replace(XNOR.data, device="cpu"))
    gpu = rates(core_decode_seconds=0.004)
    e = estimate(config, describe(config), gpu, cluster(cores=16))
    assert e.data == e.step == pytest.approx(1024 * 0.004 / 16)


def test_gradients_hide_behind_backward_but_the_last_bucket_and_the_gather_do_not() -> None:
    network = describe(XNOR)
    # A link on which the gradients of a step between 2 ranks take (58.2 + 4.2) M * 4 bytes / 2 /
    # 125 MB/s = 1 s.
    link, nodes = 125e6, cluster(num_nodes=2, ranks_per_node=1, link=125e6)
    slow = rates(flops_per_second=6 * network.macs * 512 / 60)  # backward takes 40 s
    e = estimate(XNOR, network, slow, nodes)
    assert e.gradients == pytest.approx(0.5 * 4 * network.num_parameters / link, rel=1e-3)
    last = 0.5 * 4 * 4_153_344 / link  # the bucket of the first convolution, padded to 64 a rank or less
    signs, values = 58_236_928 / 8, 4 * 4_150_176
    after = (0.5 * (signs + values) + 4 * network.num_statistics) / link
    assert e.network == pytest.approx(last + after, rel=5e-3)
    fast = estimate(XNOR, network, rates(), nodes)
    assert fast.network == pytest.approx(fast.gradients + after, rel=1e-3)
    assert fast.binding == "network"
    # All-reduce of DeepSpeed's stage 0 leaves after backward.
    none = dataclasses.replace(XNOR, engine=EngineConfig(sharding="none"))
    unsharded = estimate(none, network, slow, nodes)
    assert unsharded.network == pytest.approx(4 * (network.num_parameters + network.num_statistics) / link, rel=1e-3)


def test_with_8_gpus_a_node_halving_is_the_fastest() -> None:
    published_rates, nodes = published("h100", "tf32", 224), cluster(num_nodes=8, link=5e10, cores=112.0)
    network = describe(XNOR)
    mine = estimate(XNOR, network, published_rates, nodes)
    others = alternatives(XNOR, network, published_rates, nodes)
    rounded = others.pop("--engine.grad_comm_dtype bf16")  # halved as well, and half the bytes
    assert rounded.step < mine.step
    assert all(mine.step < other.step for other in others.values())


def test_bf16_halves_the_gradients_of_the_plan() -> None:
    network, nodes = describe(XNOR), cluster(num_nodes=4, ranks_per_node=1, link=1e9)
    half = dataclasses.replace(XNOR, engine=EngineConfig(grad_comm_dtype="bf16"))
    fp32, bf16 = (estimate(config, network, rates(), nodes).gradients for config in (XNOR, half))
    assert bf16 == pytest.approx(fp32 / 2)


def test_a_message_takes_rounds_and_the_slower_of_two_ways() -> None:
    message = Message("all_gather", 8e6)
    machine = rates(latency_seconds=1e-3, local_bytes_per_second=1e9, link_efficiency=0.5)
    # 8 ranks: 3 rounds; a node sends 7 MB on, at half of 1e9 bytes/s.
    two_nodes = cluster(num_nodes=2, ranks_per_node=4, link=1e9)
    assert two_nodes.message_seconds(message, machine) == pytest.approx(0.003 + 0.014)
    # Inside of a node each of 4 ranks sends 6 MB at 1e9.
    assert cluster(ranks_per_node=4).message_seconds(message, machine) == pytest.approx(0.002 + 0.006)


def synthetic(num_nodes: int, images_per_second: float) -> Estimate:
    values = {name: 0.0 for name in Estimate._fields} | {"images_per_second": images_per_second, "binding": "network"}
    return Estimate(**values | {"num_nodes": num_nodes})  # type: ignore[arg-type]


def test_the_limit_is_where_a_doubling_adds_little_or_efficiency_halves() -> None:
    assert find_limit([synthetic(1, 100), synthetic(2, 190), synthetic(4, 195)]) == (2, "4 give 3% more images/s")
    assert find_limit([synthetic(1, 100), synthetic(2, 90)]) == (1, "2 give 10% less images/s")
    assert find_limit([synthetic(1, 100), synthetic(2, 100)]) == (1, "2 give no more images/s")
    assert find_limit([synthetic(1, 100), synthetic(2, 130), synthetic(4, 180)]) == (
        2,
        "with 4 a node does 45% of what 1 alone does",
    )
    assert find_limit([synthetic(1, 100), synthetic(2, 200), synthetic(4, 390)]) == (4, "")
    # From 4 to 5 nodes is a third of a doubling.
    assert find_limit([synthetic(1, 100), synthetic(4, 390), synthetic(5, 410)])[0] == 5
    assert efficiency_of(synthetic(4, 300), synthetic(1, 100)) == 0.75


def test_a_scan_goes_as_far_as_the_batch_divides() -> None:
    found = scan(XNOR, describe(XNOR), rates(), cluster(num_nodes=8))
    assert [e.num_nodes for e in found] == [1, 2, 4, 8, 16, 32, 64, 128]
    fixed = dataclasses.replace(XNOR, num_replicas=24, global_batch_size=1200)
    assert [e.num_nodes for e in scan(fixed, describe(XNOR), rates(), cluster(num_nodes=3))] == [1, 3]
    with pytest.raises(ValueError, match="global_batch_size is 128.* 3 ranks"):
        estimate(SMALL, describe(SMALL), rates(), cluster(ranks_per_node=3))


def test_published_rates_name_their_sources() -> None:
    for gpu in GPUS:
        flops = []
        for precision in ("fp32", "tf32", "bf16"):
            found = published(gpu, precision, 224)  # type: ignore[arg-type]
            assert all(found.sources[name] for name in numbers(found))
            assert all(math.isfinite(value) for value in numbers(found).values())
            flops.append(found.flops_per_second)
        assert flops == sorted(flops)
        assert published(gpu, "fp16", 224) == published(gpu, "bf16", 224)
    assert published("h100", "bf16", 224).flops_per_second > published("a100", "bf16", 224).flops_per_second
    with pytest.raises(ValueError, match="--gpu .*'v100'.* a100, h100"):
        published("v100", "fp32", 224)


def test_small_images_are_decoded_faster_than_photos() -> None:
    photo, small, large = (published("h100", "bf16", size) for size in (224, 56, 448))
    assert small.decode_seconds == pytest.approx(photo.decode_seconds / 16)
    assert small.core_decode_seconds == pytest.approx(photo.core_decode_seconds / 16)
    assert "assumed for images of 56 pixels" in small.sources["decode_seconds"]
    assert large == photo


def test_rates_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rates.json"
    write_rates(rates(cores=3.0), path)
    assert read_rates(path) == rates(cores=3.0)
    with pytest.raises(ValueError, match="missing.json"):
        read_rates(tmp_path / "missing.json")
    values = json.loads(path.read_text())
    for broken, word in (
        ({"cores": -1}, "cores must be positive"),
        ({"cores": "many"}, "cores: "),
        ({"sources": {}}, "sources says"),
    ):
        path.write_text(json.dumps(values | broken))
        with pytest.raises(ValueError, match=f"rates.json .*{word}"):
            read_rates(path)
    old = {name: value for name, value in values.items() if name != "launch_seconds"} | {"module_seconds": 5e-5}
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="rates.json .*launch_seconds.* bench plan"):
        read_rates(path)


def test_command_prints_the_answer_the_table_and_the_sources(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "new" / "plan.png"
    plan(f"--nodes 8 --gpus 8 --network 400 --gpu h100 --config xnornet_imagenet --output {picture}".split())
    output = capsys.readouterr().out
    assert re.search(
        r"^8 nodes with 8 GPUs each: [\d,]+ images/s, .* 100 epochs of 1,281,167 images; the network binds\.$",
        output,
        re.M,
    )
    assert re.search(r"^More than \d nodes do not help: \d+ give \d+% more images/s\.$", output, re.M)
    assert len(re.findall(r"^ +(> )?\d+ +\d+ +\d+ .* (data|compute|network|launches)$", output, re.M)) == 8
    assert "MLPerf training 4.0" in output
    assert re.search(r"^Other options, .*bf16 [\d,]+, .*zero1 [\d,]+\.$", output, re.M)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_network_nothing_is_said_of_more_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    plan("--gpus 1 --gpu h100 --config binarynet_cifar10 --images 50000".split())
    output = capsys.readouterr().out
    assert re.search(r"^1 node with 1 GPUs each: .* epochs of 50,000 images", output, re.M)
    assert "doubling helps" not in output
    assert "Gbit/s" not in output


def test_command_takes_measured_rates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_rates(rates(device="cpu", cores=2.0, flops_per_second=1e10), tmp_path / "rates.json")
    plan(f"--gpus 2 --rates {tmp_path}/rates.json --config fashion_quickstart --epochs 3 --images 1280".split())
    output = capsys.readouterr().out
    assert re.search(
        r"^1 node with 2 ranks each: .* for 3 epochs of 1,280 images; forward and backward bind\.$", output, re.M
    )
    assert "cuda_graph" not in output
    plan(f"--gpus 2 --rates {tmp_path}/rates.json --config fashion_quickstart".split())
    assert "epochs of 6,000 images" in capsys.readouterr().out  # those of data.root


def test_bad_input() -> None:
    for arguments, sentence in (
        ("--config xnornet_imagenet", "--gpu .*--rates"),
        ("--gpu h100 --rates x --config xnornet_imagenet", "--gpu .*--rates"),
        ("--gpu h100 --nodes 2 --config xnornet_imagenet", "--network"),
        (
            "--gpu h100 --nodes 2 --network fast --config xnornet_imagenet",
            "--network.* 'fast'",
        ),
        ("--gpu h100 --nodes 3 --network 1 --config xnornet_imagenet", "global_batch_size is 1024.* 24"),
        ("--gpu h100 --config xnornet_imagenet --speed 3", "--speed"),
        ("--gpu h100 --gpus 1 --config binarynet_cifar10 --data.image_size 8", "binarynet .*8"),
        ("--gpu h100 --config xnornet_imagenet --images 1000", "1,000 training images do not fill a batch of 1,024"),
    ):
        with pytest.raises(ValueError, match=sentence):
            plan(arguments.split())
