"""data.loader "memory": the bytes of the other loaders, from images that are decoded once."""

import contextlib
import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from bitfleet.trainer.data import (
    DataConfig,
    Dataset,
    TrainLoader,
    ValidationLoader,
    decoder_of,
    memory_pipeline,
    open_dataset,
)
from bitfleet.trainer.data.machine_memory import MachineMemory
from bitfleet.trainer.data.memory_pipeline import cut_on_device, cut_on_host, storage_device, window_grids
from tests.unit.trainer.data.test_images import photo

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
NUM_REPLICAS = 12
CPU = torch.device("cpu")


def in_memory(config: DataConfig, **changes: Any) -> DataConfig:
    return dataclasses.replace(config, loader="memory", **changes)


def train_loader(
    dataset: Dataset,
    config: DataConfig,
    *,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    replicas: int = NUM_REPLICAS,
    device: torch.device = CPU,
) -> TrainLoader:
    return TrainLoader(
        dataset,
        config,
        seed=7,
        global_batch_size=batch,
        num_replicas=replicas,
        rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        device=device,
    )


def validation_loader(dataset: Dataset, config: DataConfig, rank: int = 0, world_size: int = 1) -> ValidationLoader:
    return ValidationLoader(dataset, config, rank=rank, world_size=world_size, local_world_size=world_size, device=CPU)


def digests(batches: Batches, count: int) -> list[str]:
    """Compare shapes, types and bytes."""
    return [
        hashlib.sha256(
            repr((images.shape, images.dtype, labels.dtype)).encode()
            + images.numpy().tobytes()
            + labels.numpy().tobytes()
        ).hexdigest()
        for images, labels in islice(batches, count)
    ]


def write_root(root: Path, sizes: list[tuple[int, int]], form: str = "png") -> str:
    """Colour images of these sizes (height, width) in two classes, in both splits."""
    for split, seed in (("train", 0), ("val", 1000)):
        for index, (height, width) in enumerate(sizes):
            folder = root / split / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            subsampling = {"subsampling": index % 3, "quality": 91} if form == "jpg" else {}
            photo(height, width, seed + index).save(folder / f"{index:03d}.{form}", **subsampling)
    return str(root)


@pytest.fixture(scope="module")
def cifar_like(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """53 images of 32 x 32 pixels in colour, padded by 4, as binarynet_cifar10 reads them."""
    root = write_root(tmp_path_factory.mktemp("cifar"), [(32, 32)] * 53)
    return DataConfig(root=root, num_threads=2, val_batch_size=10)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """JPEGs of many sizes, 4:4:4, 4:2:2 and 4:2:0."""
    sizes = [(60 + 7 * (index % 5), 50 + 11 * (index % 7)) for index in range(30)]
    return write_root(tmp_path_factory.mktemp("photos"), sizes, "jpg")


CONFIGS = {
    "fashion": DataConfig(num_threads=2),
    "fashion_small": DataConfig(num_threads=2, image_size=28, crop_padding=2),
    "unflipped": DataConfig(num_threads=2, flip=False),
    "cut": DataConfig(num_threads=2, image_size=20, crop_padding=0),  # windows within the image
    "framed": DataConfig(num_threads=2, image_size=37, crop_padding=5),  # the frame of validation is of 5 and 4 pixels
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fashion_mnist_has_the_bytes_of_dali(config: DataConfig) -> None:
    dataset = open_dataset(config)
    kept = train_loader(dataset, in_memory(config), batch=1200)
    whole = digests(train_loader(dataset, config, batch=1200).batches(), 11 * NUM_REPLICAS)  # 5 steps an epoch
    assert len(set(whole)) == len(whole)
    assert digests(kept.batches(), 11 * NUM_REPLICAS) == whole
    assert digests(kept.batches(7), 4 * NUM_REPLICAS) == whole[7 * NUM_REPLICAS :]
    theirs = digests(iter(validation_loader(dataset, config)), 99)
    ours = validation_loader(dataset, in_memory(config))
    assert len(theirs) == len(ours) == 10
    assert digests(iter(ours), 99) == theirs
    assert digests(iter(ours), 99) == theirs  # once more


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_small_colour_images_have_the_bytes_of_dali_on_any_number_of_ranks(
    cifar_like: DataConfig, world_size: int
) -> None:
    dataset = open_dataset(cifar_like)
    whole = digests(train_loader(dataset, cifar_like, batch=24).batches(3), 9 * NUM_REPLICAS)  # 2 steps an epoch
    per_rank = NUM_REPLICAS // world_size
    shares = [
        digests(
            train_loader(dataset, in_memory(cifar_like), batch=24, rank=rank, world_size=world_size).batches(3),
            9 * per_rank,
        )
        for rank in range(world_size)
    ]
    assert [d for step in range(9) for share in shares for d in share[step * per_rank : (step + 1) * per_rank]] == whole
    for rank in range(world_size):
        ours = validation_loader(dataset, in_memory(cifar_like), rank, world_size)
        theirs = validation_loader(dataset, cifar_like, rank, world_size)
        assert digests(iter(ours), 99) == digests(iter(theirs), 99)
        assert len(ours) == len(theirs)


def test_images_of_several_sizes_have_the_bytes_of_dali(tmp_path: Path) -> None:
    """Smaller than the window, larger, and both."""
    root = write_root(tmp_path, [(24 + 5 * (index % 6), 50 - 4 * (index % 5)) for index in range(40)])
    config = DataConfig(root=root, num_threads=2, val_batch_size=7, crop_padding=5)
    dataset = open_dataset(config)
    ours, theirs = (train_loader(dataset, each, batch=24).batches() for each in (in_memory(config), config))
    assert digests(ours, 5 * NUM_REPLICAS) == digests(theirs, 5 * NUM_REPLICAS)
    splits = [validation_loader(dataset, each) for each in (in_memory(config), config)]
    assert digests(iter(splits[0]), 99) == digests(iter(splits[1]), 99)


@pytest.mark.parametrize("preprocessing", ["torchvision", "official"])
def test_photos_have_the_bytes_of_dali_on_the_cpu(photos: str, preprocessing: Any) -> None:
    config = DataConfig(
        root=photos,
        augmentation="random_resized_crop",
        preprocessing=preprocessing,
        image_size=40,
        num_threads=2,
        val_batch_size=7,
    )
    dataset = open_dataset(config)
    whole = digests(train_loader(dataset, config, batch=12).batches(), 9 * NUM_REPLICAS)
    assert digests(train_loader(dataset, in_memory(config), batch=12).batches(), 9 * NUM_REPLICAS) == whole
    later = train_loader(dataset, in_memory(config), batch=12, rank=1, world_size=2).batches(5)
    assert digests(later, 6) == whole[5 * NUM_REPLICAS + 6 : 6 * NUM_REPLICAS]
    splits = [validation_loader(dataset, each) for each in (in_memory(config), config)]
    assert digests(iter(splits[0]), 99) == digests(iter(splits[1]), 99)
    assert len(splits[0]) == 5


@pytest.mark.parametrize("batch", [1, 50, 3000])
def test_requests_drawn_together_are_those_drawn_alone(batch: int) -> None:
    config = DataConfig()
    dataset = open_dataset(config)
    loader = train_loader(dataset, config, batch=batch, replicas=1)
    first = 6000 // batch - 2  # the end of an epoch comes soon
    alone = list(islice(loader.requests(first), 5))
    together = list(islice(loader.requests(first, 3), 5))
    assert [len(request.samples) // batch for request in together[:2]] == [2, min(3, 6000 // batch)]
    assert [request.epoch for request in together[:2]] == [0, 1]
    for name, ours, theirs in (
        ("samples", *((r.samples for r in requests) for requests in (alone, together))),
        ("starts", *((r.windows.starts for r in requests) for requests in (alone, together))),
        ("flips", *((r.flips for r in requests) for requests in (alone, together))),
    ):
        expected = np.concatenate(list(ours))
        np.testing.assert_array_equal(np.concatenate(list(theirs))[: len(expected)], expected, err_msg=name)


def test_batches_belong_to_the_caller(cifar_like: DataConfig) -> None:
    dataset = open_dataset(cifar_like)
    loader = train_loader(dataset, in_memory(cifar_like), batch=24)
    first = digests(loader.batches(), 30)
    for images, labels in islice(loader.batches(), 30):
        images.zero_()
        labels.zero_()
    assert digests(loader.batches(), 30) == first


class Operators(TorchDispatchMode):
    """The names of the operators of torch that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_device_cuts_the_same_windows_in_three_launches_and_no_wait() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5 * 40 * 36, 3), dtype=torch.uint8, generator=generator)
    grids = torch.from_numpy(window_grids(36, 32))
    flips = torch.tensor([0, 1, 1, 0])
    firsts = torch.tensor([0, 40 * 36 + 8 * 36 + 4, 2 * 40 * 36 + 3, 4 * 40 * 36 + 8 * 36 + 4])
    with Operators() as operators:
        cut = cut_on_device(pixels, grids, firsts, flips).view(4, 32, 32, 3)
    views = {"unsqueeze", "view", "slice", "_unsafe_view"}
    assert [name for name in operators.names if name not in views] == ["index_select", "add_", "index_select"]
    assert torch.equal(cut, cut_on_host(pixels, grids, firsts, flips).view(4, 32, 32, 3))
    images = pixels.view(5, 40, 36, 3)
    assert torch.equal(cut[0], images[0, :32, :32])
    assert torch.equal(cut[1], images[1, 8:, 4:].flip(1))
    assert torch.equal(cut[2], images[2, :32, 3:35].flip(1))
    assert torch.equal(cut[3], images[4, 8:, 4:])


def test_the_whole_stream_is_the_same_where_a_device_cuts(
    cifar_like: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(cifar_like)
    whole = digests(train_loader(dataset, in_memory(cifar_like), batch=24).batches(), 50)
    monkeypatch.setattr(memory_pipeline, "cut_on_host", cut_on_device)
    assert digests(train_loader(dataset, in_memory(cifar_like), batch=24).batches(), 50) == whole


def test_on_a_device_nothing_is_read_back(cifar_like: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta, which has no numbers: whatever asked for one would fail. It stands for a GPU
    here."""
    meta = torch.device("meta")
    sent: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: sent.append(tensor.shape) or tensor)  # type: ignore[func-returns-value]
    monkeypatch.setattr(memory_pipeline, "storage_device", lambda num_bytes, device, geometry: device)
    dataset = open_dataset(cifar_like)
    batches = list(islice(train_loader(dataset, in_memory(cifar_like), batch=24, device=meta).batches(), 60))
    for images, labels in batches:
        assert (images.shape, images.dtype, images.device) == ((2, 32, 32, 3), torch.uint8, meta)
        assert (labels.shape, labels.dtype, labels.device) == ((2,), torch.int64, meta)
    assert sent == [(3, 48)] * 3  # an epoch's windows, flips and labels travel together

    # Where the set does not fit there, batches travel instead.
    sent.clear()
    monkeypatch.setattr(memory_pipeline, "storage_device", lambda num_bytes, device, geometry: torch.device("cpu"))
    images, labels = next(train_loader(dataset, in_memory(cifar_like), batch=24, device=meta).batches())
    assert (images.device, labels.device) == (meta, meta)
    assert sent == [(2, 32, 32, 3), (2,)]


def test_the_place_is_the_device_up_to_a_quarter_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=4000))
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert storage_device(1000, cuda, "crop") == cuda
    assert storage_device(1001, cuda, "crop") == cpu
    assert storage_device(1, cuda, "crop_resize") == cpu  # resized by the code of the CPU
    assert storage_device(1, cpu, "crop") == cpu


def test_what_does_not_fit_is_refused(cifar_like: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(cifar_like)
    num_bytes = 53 * 3 * (40 * 40 + 32 * 32)
    exact = num_bytes / 2**30
    train_loader(dataset, in_memory(cifar_like, memory_gib=exact), batch=24)
    with pytest.raises(ValueError, match=r"0\.00 GiB .*data\.memory_gib=0\.0003.*--data\.loader dali"):
        train_loader(dataset, in_memory(cifar_like, memory_gib=exact * 0.999), batch=24)
    validation_loader(dataset, in_memory(cifar_like, memory_gib=exact * 0.4))  # an evaluation keeps no training images
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ValueError, match=r"0\.00 GiB available.*--data\.loader dali"):
        validation_loader(dataset, in_memory(cifar_like))


@pytest.mark.parametrize(
    ("augmentation", "named"),
    [("pad_crop", "with pad_crop all take as much room as"), ("random_resized_crop", "the largest is")],
)
def test_the_image_that_takes_the_room_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    augmentation: Literal["pad_crop", "random_resized_crop"],
    named: str,
) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index in range(5):
            photo(32, 32, index).save(tmp_path / split / "a" / f"{index}.png")
    config = DataConfig(root=str(tmp_path), augmentation=augmentation, loader="memory", memory_gib=1e-9, num_threads=1)
    with pytest.raises(ValueError, match=r"GiB .*/test_the\w+, and data"):
        validation_loader(open_dataset(config), config)
    photo(32, 600).save(tmp_path / "val/a/banner.png")
    with pytest.raises(ValueError, match=rf"\({named} .*/val/a/banner\.png, 600 x 32 pixels\), and data"):
        validation_loader(open_dataset(config), config)


def test_without_dali_pillow_decodes_what_is_not_resized(
    cifar_like: DataConfig, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(cifar_like)
    whole = digests(train_loader(dataset, in_memory(cifar_like), batch=24).batches(), 30)
    resized = in_memory(DataConfig(root=photos, augmentation="random_resized_crop", image_size=40))
    assert decoder_of(in_memory(cifar_like)) == decoder_of(resized) == "dali"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert decoder_of(in_memory(cifar_like)) == "torch"
    assert decoder_of(cifar_like) == "dali"
    assert digests(train_loader(dataset, in_memory(cifar_like), batch=24).batches(), 30) == whole
    with pytest.raises(ValueError, match="DALI.* not installed"):
        train_loader(open_dataset(resized), resized, batch=12)


def damage(dataset: Dataset) -> None:
    """Break four training images, each in a different way, and two validation images."""
    paths = [Path(dataset.train.path(index)) for index in (3, 17, 40, 41)]
    paths[0].unlink()
    os.truncate(paths[1], paths[1].stat().st_size // 2)
    paths[2].write_bytes(b"")
    paths[3].write_text("<html>")
    for index in (12, 52):
        Path(dataset.val.path(index)).write_text("no image")


def test_broken_images_are_replaced_as_by_dali(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_root(tmp_path, [(32, 32)] * 53)
    config = DataConfig(root=root, num_threads=2, val_batch_size=10, on_bad_sample="replace")
    dataset = open_dataset(config)
    damage(dataset)
    ours, theirs = (train_loader(dataset, each, batch=24) for each in (in_memory(config), config))
    counts = [0, 0]
    for k, loader in enumerate((ours, theirs)):
        stream = loader.batches()
        found = digests(stream, 9 * NUM_REPLICAS)
        counts[k] = loader.num_replaced
        if k == 0:
            first = found
    assert found == first
    assert counts[0] > 4
    assert counts[1] - counts[0] in range(4)  # DALI had begun to read further
    splits = [validation_loader(dataset, each) for each in (in_memory(config), config)]
    assert digests(iter(splits[0]), 99) == digests(iter(splits[1]), 99)
    error = capfd.readouterr().err
    assert (
        error.count("/train/a/006.png cannot be decoded (No such file or directory); replaced by") == 2
    )  # once a loader
    assert error.count("left out of validation") == 4


@pytest.mark.parametrize("loader", ["memory", "dali"])
def test_a_smaller_image_in_the_place_of_one_is_broken(tmp_path: Path, loader: Any) -> None:
    """Also where nothing is resized, and DALI would put a black frame around it."""
    root = write_root(tmp_path, [(32, 32)] * 24)
    config = DataConfig(root=root, num_threads=1, loader=loader)
    dataset = open_dataset(config)
    Image.new("RGB", (30, 32)).save(dataset.train.path(5))
    with pytest.raises(ValueError, match=r"\.png .*\(.*30 x 32 .* 32 x 32\)"):
        digests(train_loader(dataset, config, batch=24).batches(), NUM_REPLICAS)


def test_a_broken_image_ends_a_run_at_its_start(tmp_path: Path) -> None:
    config = in_memory(DataConfig(root=write_root(tmp_path, [(32, 32)] * 24), num_threads=1))
    dataset = open_dataset(config)
    Path(dataset.val.path(2)).write_bytes(b"")
    train_loader(dataset, config, batch=24)
    with pytest.raises(ValueError, match=r"val/a/004\.png .*\(the file is empty\)"):
        validation_loader(dataset, config)


def test_past_the_limit_of_broken_images_a_run_ends(tmp_path: Path) -> None:
    root = write_root(tmp_path, [(32, 32)] * 24)
    config = in_memory(DataConfig(root=root, num_threads=1, on_bad_sample="replace", max_bad_samples=1))
    dataset = open_dataset(config)
    for index in (1, 5):
        Path(dataset.train.path(index)).unlink()
    with pytest.raises(ValueError, match=r"data\.max_bad_samples=1 "):
        digests(train_loader(dataset, config, batch=24).batches(), 2 * NUM_REPLICAS)


RANK = """
import os, sys, torch
from bitfleet.trainer.ranks import collectives
from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, open_dataset
from bitfleet.trainer.data.memory_pipeline import DecodedImages
from tests.unit.trainer.data.test_memory_pipeline import digests

collectives._job_word = sys.argv[1]
taken = []
keep = DecodedImages._store
DecodedImages._store = lambda self, image, sample: (taken.append(sample), keep(self, image, sample))
rank, root = int(sys.argv[2]), sys.argv[3]
config = DataConfig(root=root, loader="memory", num_threads=1)
dataset = open_dataset(config)
place = {"rank": rank, "world_size": 2, "local_world_size": 2, "device": torch.device("cpu")}
print("ready", flush=True)
sys.stdin.readline()
loader = TrainLoader(dataset, config, seed=7, global_batch_size=24, num_replicas=12, **place)
found = digests(loader.batches(), 30)
memory = loader._pipeline._memory
print(os.fstat(memory._file).st_ino, len(taken), *found, flush=True)
sys.stdin.readline()
ValidationLoader(dataset, config, **place)
"""


@contextlib.contextmanager
def ranks_on_a_machine(tmp_path: Path, root: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Two processes that know the same word and have opened the data; a line tells each to go
    on."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    repository = Path(__file__).parents[4]
    places = os.pathsep.join([str(repository / "src"), str(repository)])
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RANK, "abc", str(rank), root],
                    text=True,
                    env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": places},
                    **pipes,
                )
            )
            for rank in range(2)
        ]
        for rank in ranks:
            stack.callback(rank.kill)
        assert [said(rank) for rank in ranks] == [["ready"]] * 2
        yield ranks


def said(rank: "subprocess.Popen[str]") -> list[str]:
    assert rank.stdout is not None
    return rank.stdout.readline().split()


def go_on(ranks: list["subprocess.Popen[str]"]) -> None:
    for rank in ranks:
        print(file=rank.stdin, flush=True)


def test_the_ranks_of_a_machine_share_one_copy_the_work_and_its_faults(tmp_path: Path) -> None:
    root = write_root(tmp_path / "data", [(32, 32)] * 300)
    config = DataConfig(root=root, num_threads=1)
    dataset = open_dataset(config)
    with ranks_on_a_machine(tmp_path, root) as ranks:
        go_on(ranks)
        lines = [said(rank) for rank in ranks]
        assert list((tmp_path / "tmp").iterdir()) == []  # the last to come takes the signpost away
        broken = Path(dataset.val.path(9))
        broken.write_bytes(b"")
        go_on(ranks)
        for rank in ranks:
            _, error = rank.communicate(timeout=600)
            assert rank.returncode == 1
            assert f"{broken} cannot be decoded (the file is empty)" in error
    assert len({inode for inode, *_ in lines}) == 1
    assert sum(int(taken) for _, taken, *_ in lines) == 300  # every image was decoded once
    whole = digests(train_loader(dataset, config, batch=24).batches(), 5 * NUM_REPLICAS)
    shares = [found for _, _, *found in lines]
    assert [d for step in range(5) for share in shares for d in share[6 * step : 6 * step + 6]] == whole


def test_jobs_of_a_memory_are_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    numbers = iter([5, 5])
    monkeypatch.setattr("bitfleet.trainer.data.machine_memory._numbers", numbers)
    one, two = (MachineMemory(10, job="word", num_ranks=2) for _ in range(2))
    assert one.all_have_joined
    assert list(tmp_path.iterdir()) == []
    one.bytes[3] = 7
    assert two.bytes.tolist() == [0, 0, 0, 7, 0, 0, 0, 0, 0, 0]
    first, second = one.take_jobs(5), two.take_jobs(5)
    taken = [next(first), next(second), next(second), next(first)]
    assert taken == [0, 1, 2, 3]
    assert list(second) == [4]
    assert list(first) == []
    checked: list[int] = []
    for _ in range(4):
        one.finish_job()

    def check(done: int) -> None:
        checked.append(done)
        if len(checked) == 3:
            two.finish_job()

    one.wait_for_jobs(5, check)
    assert checked == [4, 4, 4]
    kept = MachineMemory(4, job=None, num_ranks=1).bytes
    kept[3] = 7  # without the object
    assert kept.tolist() == [0, 0, 0, 7]


def test_a_rank_that_hangs_is_waited_for_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfleet.trainer.data.machine_memory._SILENT_SECONDS", 0.05)
    memory = MachineMemory(1, job=None, num_ranks=1)
    with pytest.raises(ValueError, match="another rank .* 0.05 s"):
        memory.wait_for_jobs(1, lambda done: None)


def test_a_process_that_cannot_be_seen_shares_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in another container, where its number is that of another process, or of none."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("bitfleet.trainer.data.machine_memory._numbers", iter([0]))
    (tmp_path / "bitfleet-word-0").write_text(f"{os.getpid()} 0 1\n")  # its descriptor 0 is not our memory
    memory = MachineMemory(10, job="word", num_ranks=3)
    assert "copy" in capfd.readouterr().err
    assert memory.bytes.tolist() == [0] * 10
    assert (tmp_path / "bitfleet-word-0").read_text().split()[2] == "2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_gib": 0.0}, r"data\.memory_gib=0\.0 must be positive"),
        ({"loader": "memory", "device": "gpu"}, r"data\.loader='memory' decodes on the CPU"),
    ],
)
def test_wrong_values_in_the_config(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
