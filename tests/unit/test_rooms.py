"""Import rules: launch -> configs -> trainer -> optim, models; a ladder inside trainer and optim;
owners of libraries.

Everything in trainer/ is part of a training run: importing the trainer reaches it.
"""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOMS = {
    "optim": {"optim"},
    "models": {"models"},
    "trainer": {"trainer", "optim", "models"},
    "configs": {"configs", "trainer", "optim", "models"},
    "launch": {"launch", "configs", "trainer", "optim", "models"},
}
SHARED = {"c_library", "packed"}
"""Modules of the package itself, below all rooms; packed is a link to models/packed, which needs no
torch except to lower networks."""
OWNERS = {
    "deepspeed": ("trainer/engine/", "launch/"),
    "nvidia": ("trainer/data/", "launch/data/"),
    "h5py": ("models/keras/",),
    "tensorboard": ("trainer/metrics/",),
    "torch.utils.tensorboard": ("trainer/metrics/",),
    "torch.distributed": ("trainer/ranks/", "trainer/checkpoint/", "optim/sharding/", "launch/bench/training.py"),
}
LADDERS: dict[str, list[set[str]]] = {
    "trainer": [
        {"trainer"},
        {"evaluate", "train_step"},
        {"config"},
        {"checkpoint"},
        {"metrics"},
        {"journal"},
        {"engine", "data", "distillation"},
        {"run"},
        {"ranks"},
    ],
    "optim": [
        {"config"},
        {"diagnostics"},
        {"sharding"},
        {"transitions"},
        {"param_groups"},
        {"rules"},
        {"kernels", "schedules"},
    ],
}
"""Parts of a room; each imports only itself and parts of later rungs."""
NAMES_TRAIN_CONFIG = ("trainer/trainer.py", "trainer/evaluate.py", "trainer/config.py", "configs/", "launch/")
ENTRIES = ("trainer.trainer", "trainer.evaluate", "trainer.ranks.membership")
"""Modules that a training process imports; launch/job.py joins the ranks by the last one."""
FILES = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Dotted names that the file at `path` imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_keep_to_their_room(path: Path) -> None:
    relative = str(path.relative_to(REPOSITORY))
    room = relative.split("/")[0]
    for name in imports(path):
        if name.startswith("bitfleet."):
            assert name.split(".")[1] in ROOMS[room] | SHARED, f"{relative} imports {name}"
        assert name.split(".")[0] not in ROOMS, f"{relative} imports the bare name {name}"
        for library, owners in OWNERS.items():
            if name == library or name.startswith(library + "."):
                assert relative.startswith(owners), f"{relative} imports {name}"


def test_package_is_links_to_the_rooms() -> None:
    package = REPOSITORY / "src" / "bitfleet"
    for room in ROOMS:
        assert (package / room).resolve() == REPOSITORY / room
    assert (package / "packed").resolve() == REPOSITORY / "models" / "packed"
    files = {"__init__.py", "c_library.py", "packed", "py.typed"}
    assert {path.name for path in package.iterdir()} - {"__pycache__"} == {*files, *ROOMS}


@pytest.mark.parametrize("room", LADDERS)
def test_parts_import_down_the_ladder(room: str) -> None:
    rung = {part: height for height, parts in enumerate(LADDERS[room]) for part in parts}
    parts = {
        path.stem for path in (REPOSITORY / room).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} == set(rung)
    for path in (REPOSITORY / room).rglob("*.py"):
        part = path.relative_to(REPOSITORY / room).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in imports(path):
            if name.startswith(f"bitfleet.{room}."):
                other = name.split(".")[2]
                assert other == part or rung.get(other, -1) > rung[part], f"{path} imports {name}"


def test_only_the_trainer_and_what_starts_it_know_the_whole_configuration() -> None:
    for path in FILES:
        name = str(path.relative_to(REPOSITORY))
        if not name.startswith(NAMES_TRAIN_CONFIG):
            assert "bitfleet.trainer.config.TrainConfig" not in imports(path), name


def test_trainer_holds_only_what_a_run_imports() -> None:
    modules = {}
    for path in FILES:
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    reached: set[str] = set()
    pending = list(ENTRIES)
    while pending:
        name = pending.pop()
        if name in modules and name not in reached:
            reached.add(name)
            pending += [each.removeprefix("bitfleet.") for each in imports(modules[name])]
            pending += [each.removeprefix("bitfleet.").rpartition(".")[0] for each in imports(modules[name])]
            pending.append(name.rpartition(".")[0])
    assert {name for name in modules if name.startswith("trainer.")} - reached == set()
