"""Layout: class folders train/<class>/ and val/<class>/, and Tiny ImageNet, whose val/ is flat."""

import functools
from pathlib import Path

from bitfleet.launch.data.source import Listing, PartialLayout, Source, list_images, register_layout
from bitfleet.trainer.data.image_list import Manifest
from bitfleet.trainer.data.scan import (
    ANNOTATIONS,
    has_class_folder,
    is_tiny_imagenet,
    scan_root,
    split_folder,
    split_folders,
)


@register_layout(
    "class folders train/<class>/ and val/<class>/; Tiny ImageNet's train/<class>/images/ and val/images/ with "
    f"{ANNOTATIONS}"
)
def detect(source: Path) -> Source | None:
    """Return the class folders in `source`, or None."""
    folders = {split: split_folder(source, split) for split in ("train", "val")}
    train, val = folders["train"], folders["val"]
    if train is not None and val is not None:
        layout = "Tiny ImageNet" if is_tiny_imagenet(val) else "class folders"
        return Source(layout=layout, make=functools.partial(list_class_folders, source, layout))
    present = train or val
    if present is None:
        return None
    missing = "val" if val is None else "train"
    state = "has no class folder in it" if split_folders(source, missing) else "is missing"
    hint = ""
    if missing == "val" and has_class_folder(source / "test"):
        hint = " (test/ has class folders: if its images are for validation, rename it, or link val/ to it)"
    elif missing == "val":
        hint = " (Kaggle's form? Then give the folder above ILSVRC/, with LOC_val_solution.csv)"
    raise PartialLayout(f"there are class folders in {present.name}/, but the folder {missing}/ {state}{hint}")


def list_class_folders(root: Path, layout: str, *, num_workers: int) -> Listing:
    """List the images in class folders of `root` and read their headers.

    Raises:
        ValueError: See scan_root.
    """
    scan = scan_root(root, str(root))
    train, unreadable = list_images(root, "train", scan.train, num_workers=num_workers)
    val, unreadable_val = list_images(root, "val", scan.val, num_workers=num_workers)
    return Listing(
        manifest=Manifest(train=train, val=val, classes=scan.train.classes, layout=layout),
        omitted={"train": scan.train.omitted, "val": scan.val.omitted, "root": scan.others},
        unreadable=unreadable | unreadable_val,
        unread=scan.unread,
        faults=scan.faults,
    )
