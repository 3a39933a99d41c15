"""The house rules that imports can show: launch -> configs -> trainer -> optim, models, and who may import what."""

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
SHARED = "c_library"
"""A module of the package itself, below all rooms."""
OWNERS = {
    "deepspeed": ("trainer/engine/engine.py", "launch/"),
    "nvidia": ("trainer/data/", "launch/data/verify.py"),
    "h5py": ("models/keras/files.py",),
    "tensorboard": ("trainer/metrics",),
    "torch.utils.tensorboard": ("trainer/metrics",),
    "torch.distributed": (
        "trainer/ranks/collectives.py",
        "optim/sharding",
        "trainer/checkpoint/planners.py",
        "trainer/checkpoint/tensors.py",
        "trainer/ranks/rendezvous.py",
    ),
}
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
            assert name.split(".")[1] in ROOMS[room] | {SHARED}, f"{relative} imports {name}"
        assert name.split(".")[0] not in ROOMS, f"{relative} imports the bare name {name}"
        for library, owners in OWNERS.items():
            if name == library or name.startswith(library + "."):
                assert relative.startswith(owners), f"{relative} imports {name}"


def test_package_is_links_to_the_rooms() -> None:
    package = REPOSITORY / "src" / "bitfleet"
    for room in ROOMS:
        assert (package / room).resolve() == REPOSITORY / room
    files = {"__init__.py", f"{SHARED}.py", "py.typed"}
    assert {path.name for path in package.iterdir()} - {"__pycache__"} == {*files, *ROOMS}
