"""Environment variables that must reach the ranks on other machines.

DeepSpeed takes along what begins with PYTHON, UCX, MV2 or MLFLOW (and NCCL where the launching machine has a GPU), and the lines
of ~/.deepspeed_env and ./.deepspeed_env, or of the file that DS_ENV_FILE names; nothing else.
"""

import re
from collections.abc import Mapping
from pathlib import Path

PREFIXES = tuple("BITFLEET_ NCCL_ GLOO_ TORCH_ OMP_ MKL_ KMP_ GOMP_ MALLOC_ DALI_ CUDA_DEVICE_ CUBLAS_".split())
NAMES = tuple("DS_ACCELERATOR DEEPSPEED_TIMEOUT LD_LIBRARY_PATH LD_PRELOAD CUDA_HOME".split())


def traveling(environ: Mapping[str, str], device: str) -> dict[str, str]:
    """The variables of `environ` that ranks elsewhere need too.

    Args:
        environ: of the launching shell.
        device: "auto", "cpu" or "gpu"; with "cpu" DeepSpeed is told so, which otherwise warns on every rank.

    Raises:
        ValueError: a value of several lines, which no file of lines can hold.
    """
    found = {name: value for name, value in sorted(environ.items()) if name.startswith(PREFIXES) or name in NAMES}
    if device == "cpu":
        found.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in found.items():
        if "\n" in value:
            raise ValueError(
                f"the environment variable {name} has several lines, which cannot travel to other machines: unset it"
            )
    return found


def deepspeed_line(name: str, value: str) -> str:
    """`NAME=VALUE` as DeepSpeed's file wants it: it puts values with special characters between double quotes of a shell."""
    if re.search(r"[^\w@%+=:,./-]", value):
        value = re.sub(r'([\\"$`])', r"\\\1", value)
    return f"{name}={value}"


def users_lines(folders: tuple[Path, ...]) -> list[str]:
    """The lines of the user's own .deepspeed_env in `folders`, later ones winning.

    Raises:
        ValueError: a line without "=", over which DeepSpeed fails.
    """
    lines = []
    for path in (folder / ".deepspeed_env" for folder in folders):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not re.match(r"\s*\w+\s*=", line):
                raise ValueError(
                    f"{path}, line {number}: DeepSpeed reads only lines NAME=VALUE, not {line!r}: remove it"
                )
            lines.append(line)
    return lines
