"""Published runs, from papers.json: published numbers, neighbours, and differences of bitfleet.

Sources: arXiv 2104.05124 ("the paper") and its code, CuauSuarez/Bop2ndOrder, branch conference
(README: accuracies; models/*_batch.py: recipes; data/imagenet.py); larq/zoo 2.4.0 for QuickNet;
plumerai/rethinking-bnn-optimization and larq-zoo for the neighbours.
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

DRY_RUN = "fashion_dry_run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    """A run of the paper."""

    name: str
    """Name in `bitfleet reproduce NAME`."""
    title: str
    config: str
    """Configuration with the paper's recipe; its expected curves have the same name."""
    top1: float
    """Published top-1, percent."""
    top5: float | None = None
    """Published top-5, percent; None: not published."""
    tolerance: float
    """Points of top-1 within which a run agrees. No paper states a spread over seeds. Bop, which
    Bop2ndOrder improves on, is 0.6 to 1.0 points below: a run that fell to Bop's number must not
    pass."""
    steps_per_epoch: int
    num_validation_images: int
    num_replicas: int | None = None
    """Replicas in the paper's code; None: as many as the machine has GPUs, which is not stated."""
    neighbours: tuple[dict[str, Any], ...]
    """Other published results of the network: "name", and "top1" and "top5" in percent."""
    differences: tuple[str, ...]
    """Differences between any run of bitfleet and the paper's."""
    dry_run: bool = False


def _read_papers() -> dict[str, Paper]:
    content, papers = json.loads(Path(__file__).with_name("papers.json").read_text()), {}
    for fields in content["papers"]:
        neighbours = tuple(dict(zip(("name", "top1", "top5"), row, strict=True)) for row in fields["neighbours"])
        differences = tuple(text for group in fields["differences"] for text in content["differences"][group])
        papers[fields["name"]] = Paper(**{**fields, "neighbours": neighbours, "differences": differences})
    return papers


PAPERS = _read_papers()


def find_paper(name: str, *, dry_run: bool = False) -> Paper:
    """Return a run of the paper; its dry run has a miniature network and the embedded images.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in PAPERS:
        near = difflib.get_close_matches(name, PAPERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"bitfleet reproduce knows {', '.join(PAPERS)}, not {name!r}; did you mean {near!r}?")
    if not dry_run:
        return PAPERS[name]
    dry = dataclasses.replace(PAPERS[name], config=DRY_RUN, num_replicas=None, dry_run=True)
    return dataclasses.replace(dry, steps_per_epoch=46, num_validation_images=1000)
