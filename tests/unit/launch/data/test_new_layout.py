"""A layout from one file, as docs/extending.md describes it: recognised, prepared, verified and
read for training."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from bitfleet.launch.data import source as registry
from bitfleet.launch.data.layouts import recognise
from bitfleet.launch.data.prepare import prepare
from bitfleet.launch.data.verify import verify
from bitfleet.trainer.data import DataConfig, TrainLoader, open_dataset
from tests import miniature

LAYOUT = '''
"""Layout: all images in images/, their split and class in table.csv."""

import csv
import functools
from pathlib import Path

from bitfleet.launch.data.source import Listing, Source, list_images, register_layout
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.image_list import Manifest
from bitfleet.trainer.data.scan import ClassFolders, find_images


@register_layout("images/ with table.csv")
def detect(source: Path) -> Source | None:
    """Return the data set in `source`, or None."""
    if not (source / "table.csv").is_file():
        return None
    return Source(layout="table of images", make=functools.partial(list_table, source))


def list_table(folder: Path, *, num_workers: int) -> Listing:
    """List the images that the table has a row for."""
    with open(folder / "table.csv", newline="") as lines:
        rows = {row["file"]: row for row in csv.DictReader(lines)}
    classes = tuple(sorted({row["class"] for row in rows.values()}))
    splits = {split: ClassFolders(folder=folder / "images", classes=classes) for split in ("train", "val")}
    train = splits["train"]
    for image in find_images(f"{folder}/images", train.omitted, train.unread):
        if image.name not in rows:
            train.omitted.add(left_out.NO_LABEL, image.name)
            continue
        split = splits[rows[image.name]["split"]]
        split.images.append(image)
        split.labels.append(classes.index(rows[image.name]["class"]))
    lists, unreadable = {}, {}
    for name, split in splits.items():
        lists[name], reasons = list_images(folder, name, split, num_workers=num_workers)
        unreadable |= reasons
    return Listing(
        manifest=Manifest(**lists, classes=classes, layout="table of images"),
        omitted={"train": train.omitted},
        unreadable=unreadable,
        unread=train.unread,
    )
'''
TABLE = "file,class,split\na.png,dog,train\nb.png,cat,train\nc.png,dog,val\nd.png,cat,val\ne.png,dog,train\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the layout, whose file is imported as layouts.py imports the others."""
    file = tmp_path / "table_layout.py"
    file.write_text(LAYOUT)
    monkeypatch.setattr(registry, "LAYOUTS", list(registry.LAYOUTS))
    monkeypatch.setattr("bitfleet.launch.data.layouts.LAYOUTS", registry.LAYOUTS)
    spec = importlib.util.spec_from_file_location("table_layout", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "table_layout", module)
    spec.loader.exec_module(module)
    photos = {f"images/{name}.png": miniature.photo(index % 2, 3) for index, name in enumerate("abcdef")}
    return miniature.write(tmp_path / "source", {"table.csv": TABLE.encode(), **photos})


def test_a_layout_is_one_file(source: Path, tmp_path: Path) -> None:
    assert recognise(source).layout == "table of images"
    with pytest.raises(ValueError, match=r"1 images without a label.*f\.png.*--allow_incomplete"):
        prepare(source, tmp_path / "dest", num_workers=2)
    summary = prepare(source, tmp_path / "dest", num_workers=2, allow_incomplete=True)
    assert "layout    table of images" in summary
    report, num_failed = verify(tmp_path / "dest", num_workers=1)
    assert (num_failed, "every image decodes" in report) == (0, True)

    config = DataConfig(root=str(tmp_path / "dest"), num_threads=1)
    dataset = open_dataset(config)
    assert dataset.classes == ("cat", "dog")
    assert [dataset.train.name(index) for index in range(3)] == ["images/a.png", "images/b.png", "images/e.png"]
    assert (dataset.train.labels.tolist(), dataset.val.labels.tolist()) == ([1, 0, 1], [1, 0])
    loader = TrainLoader(
        dataset,
        config,
        seed=0,
        global_batch_size=3,
        num_replicas=1,
        rank=0,
        world_size=1,
        local_world_size=1,
        device=torch.device("cpu"),
    )
    images, labels = next(loader.batches())
    assert images.shape == (3, 32, 32, 3)
    assert sorted(labels.tolist()) == [0, 1, 1]


def test_the_file_of_a_data_set_in_no_layout_is_named_with_what_is_looked_for(source: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for: .*images/ with table\.csv"):
        recognise(source / "images")
