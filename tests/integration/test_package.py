"""Install by `pip install .`: one package in site-packages, with all its files."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_install_puts_exactly_one_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_symlink():
            (source / name).symlink_to(os.readlink(REPOSITORY / name))
        elif (REPOSITORY / name).exists():
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    target = tmp_path / "site-packages"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(source)], check=True)
    packages = {path.name for path in target.iterdir() if path.is_dir() and path.suffix != ".dist-info"} - {"bin"}
    assert packages == {"bitfleet"}
    assert not (target / "bitfleet" / "optim").is_symlink()
    for name in (
        "py.typed",
        "optim/kernels/kernels.c",
        "launch/cluster/slurm.sh",
        "launch/cluster/kubernetes.yaml",
        "trainer/data/fashion_mnist/subset.npz",
        "trainer/data/fashion_mnist/LICENSE.txt",
        "launch/reproduce/expected/fashion_dry_run.json",
    ):
        assert (target / "bitfleet" / name).is_file(), name
    check = (
        "import bitfleet.optim, sys; from bitfleet.configs import available; print(bitfleet.__file__, len(available()))"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == str(target / "bitfleet" / "__init__.py")
