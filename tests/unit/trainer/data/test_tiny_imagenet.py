"""Tiny ImageNet: a table has the labels of validation."""

from pathlib import Path

import pytest

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.splits import scan_root
from bitfleet.trainer.data.tiny_imagenet import is_tiny_imagenet
from tests.unit.trainer.data.test_class_folders import write

TINY = ["train/n1/images/n1_0.JPEG", "train/n1/images/n1_1.JPEG", "train/n2/images/n2_0.JPEG"]


def tiny(root: Path, table: str) -> Path:
    write(root, *TINY, "train/n1/n1_boxes.txt", *(f"val/images/val_{i}.JPEG" for i in range(3)))
    (root / "val/val_annotations.txt").write_text(table)
    return root


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tiny(tmp_path, "val_0.JPEG\tn2\t0\t0\t1\t1\nval_1.JPEG\tn1\t0\t0\t1\t1\nval_2.JPEG\tn2\t0\t0\t1\t1\n")
    assert is_tiny_imagenet(root / "val")
    scan = scan_root(root)
    assert scan.train.names == [name.removeprefix("train/") for name in TINY]
    assert scan.val.names == ["images/val_1.JPEG", "images/val_0.JPEG", "images/val_2.JPEG"]
    assert scan.val.labels == [0, 1, 1]
    assert scan.faults == ()
    assert scan.val.omitted.counts == {}
    assert scan.train.omitted.counts == {left_out.TEXT: 1}


def test_tiny_imagenet_in_part(tmp_path: Path) -> None:
    scan = scan_root(tiny(tmp_path, "val_0.JPEG\tn2\nval_1.JPEG\tn3\nval_9.JPEG\tn1\n"))
    assert scan.val.names == ["images/val_0.JPEG"]
    assert scan.val.omitted.counts == {left_out.NO_CLASS: 1, left_out.NO_LABEL: 1, left_out.NO_IMAGE: 1}
    assert scan.faults == (f"{tmp_path}/val/val_annotations.txt names no image of the class 'n1'",)
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG n2\n")
    with pytest.raises(
        ValueError, match="line 1 of .*val_annotations.txt is 'val_0.JPEG n2': expected an image, a tab"
    ):
        scan_root(tmp_path)


def test_tiny_imagenet_sorted_into_classes_is_class_folders(tmp_path: Path) -> None:
    write(tmp_path, *TINY, "val/n1/images/1.JPEG", "val/n2/images/2.JPEG", "val/val_annotations.txt")
    assert not is_tiny_imagenet(tmp_path / "val")
    assert scan_root(tmp_path).val.names == ["n1/images/1.JPEG", "n2/images/2.JPEG"]
