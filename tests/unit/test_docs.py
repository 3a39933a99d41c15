"""The documents: every link, anchor, file, command and option that they name exists, and their
examples run."""

import ast
import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from bitfleet.launch.cli import COMMANDS
from bitfleet.trainer.config import TrainConfig

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
CODE_BLOCK = re.compile(r"^```.*?^```$|^(?: {4}[^\n]*\n)+", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOMS = r"(?:\.ci|\.github|configs|docs|launch|models|optim|src|tests|trainer)"
FILE = re.compile(rf"(?<![\w./~-]){ROOMS}/[\w./-]*\w")
CALL = re.compile(r"(?:\bbitfleet|-m(?:odule)? bitfleet\.launch|\blaunch/(?=train\.py|evaluate\.py)) ?([a-z]+)\b(.*)")
OPTION = re.compile(r"(?<![\w-])--([a-z][\w.]*)")
EXAMPLE = re.compile(r"<!-- example: (\w+) -->\n+```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

CHECKS = {
    "rule": """
from bitfleet.optim import OptimConfig, build_optimizer
from bitfleet.models import QuantLinear

model = QuantLinear(2, 1, input_quantizer=None)
optimizer, _ = build_optimizer(model, OptimConfig(rule="vote", gamma=constant(0.5)), num_steps=1)
before = model.weight.detach().clone()
model.weight.grad = before * torch.tensor([[2.0, -3.0]])
optimizer.step()
assert (model.weight == before * torch.tensor([[-1.0, 1.0]])).all()  # only the first has its gradient's sign
""",
    "network": """
import torch
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import param_groups

model = create_model(ModelConfig(name="two_layers", num_classes=5, width=8))
assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
groups = {group["name"]: group["params"] for group in param_groups(model)}
assert [param.shape for _, param in groups["binary"]] == [(8, 8, 3, 3)]
""",
    "layout": """
from PIL import Image
from bitfleet.launch.data.layouts import recognise

for split in ("train", "val"):
    Path(split).mkdir()
    for name in ("dog_1", "cat_1"):
        Image.new("RGB", (4, 3)).save(f"{split}/{name}.jpg")
Path("train/notes.txt").touch()
source = recognise(Path())
listing = source.make(num_workers=1)
assert source.layout == "flat" and listing.manifest.classes == ("cat", "dog")
assert listing.manifest.val.labels.tolist() == [0, 1]
assert sum(listing.counts()["train"].values()) == 1
""",
    "backbone": """
assert [output.shape for output in outputs] == [(1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]
""",
    "sweep": """
from pathlib import Path

from bitfleet.configs.sweeps.sweep import plan_runs
from bitfleet.launch.parsing.arguments import parse_train

runs = plan_runs(sweep(), Path(), [], lambda words: parse_train(words, "t"))
thresholds = [(run.config.optim.threshold.kind, run.config.optim.threshold.start) for run in runs]
assert thresholds == [("constant", value) for value in THRESHOLDS] * 3
""",
}
"""Example -> code that fails unless the example does what the page says."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
        if found[anchor]:
            found[f"{anchor}-{found[anchor]}"] = 0
    return set(found)


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page that lead to no file or to no heading."""
    broken = []
    for link in LINK.findall(CODE_BLOCK.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def calls(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of bitfleet that a page shows in code, each with its options."""
    text = page.read_text()
    blocks = CODE_BLOCK.findall(text)
    inline = re.findall(r"`([^`]+)`", CODE_BLOCK.sub("", text))
    for line in [line for block in blocks for line in block.splitlines()] + [" ".join(code.split()) for code in inline]:
        shown = line.split(" #")[0]
        if call := CALL.search(shown):
            yield call[1], OPTION.findall(call[2])
        elif shown.startswith("--"):
            yield "", OPTION.findall(shown)


@functools.cache
def run_options(part: Any = TrainConfig, prefix: str = "") -> set[str]:
    """Return the names of all fields of a run's configuration, "optim.gamma.start" for example."""
    names = set()
    for name, kind in get_type_hints(part).items():
        names.add(prefix + name)
        for owner in (kind, *get_args(kind)):
            if dataclasses.is_dataclass(owner):
                names |= run_options(owner, f"{prefix}{name}.")
    return names | {"config", "reproduce", "help"}


@functools.cache
def command_options(command: str) -> set[str]:
    """Return every option in the source of a command: a field, its other name, or "--x" in a
    string."""
    folder = {"launch": "cluster", "": ""}.get(command, command)
    names: set[str] = set()
    for path in [*(REPOSITORY / "launch" / folder).rglob("*.py"), REPOSITORY / "launch" / f"{command or 'cli'}.py"]:
        for node in ast.walk(ast.parse(path.read_text())) if path.exists() else ():
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.keyword) and node.arg == "name" and isinstance(node.value, ast.Constant):
                names.add(str(node.value.value))  # tyro.conf.arg(name="print")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= set(OPTION.findall(node.value))
    return names


def test_each_kind_of_fault_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n\n[here](#a-b-c) [lost](#d) [away](no.md) [far](https://example.org/no.md)\n\n    [x](code.md)\n\n"
        "`bitfleet report --colour` and `--epochs 2`\n"
    )
    assert broken_links(page) == ["#d", "no.md"]
    assert list(calls(page)) == [("report", ["colour"]), ("", ["epochs"])]
    assert "colour" not in command_options("report") | run_options()
    assert "epochs" in run_options()


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


@each_page
def test_files_of_the_repository_exist(page: Path) -> None:
    text = re.sub(r"https?://\S+", "", page.read_text())
    named = {name for name in FILE.findall(text) if "NAME" not in name}
    assert not [name for name in sorted(named) if not (REPOSITORY / name).exists()]


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for command, options in calls(page):
        assert command in {*COMMANDS, ""}, command
        known = command_options(command) | run_options()
        assert not [option for option in options if option not in known], command


@pytest.mark.parametrize("name", CHECKS)
def test_examples_run(name: str, tmp_path: Path) -> None:
    """Each runs in its own process, since some extend a registry."""
    examples = {found: code for page in PAGES for found, code in EXAMPLE.findall(page.read_text())}
    assert examples.keys() == CHECKS.keys()
    source = f"{examples[name]}\n{CHECKS[name]}"
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
