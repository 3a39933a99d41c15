"""Files of weights that Keras wrote, as arrays by name."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "read_keras_file"]

Array = NDArray[Any]


def read_keras_file(path: Path) -> dict[str, Array]:
    """All variables of a file by name, "layer/variable:0" in .h5 and as `np.savez` got it in .npz.

    Args:
        path: .npz, or .h5 of Keras 2's `model.save_weights` or `model.save`.

    Raises:
        ValueError: no such file, another suffix, or not a file of Keras.
    """
    if path.suffix not in (".npz", ".h5"):
        raise ValueError(f"the weights file {path} ends in {path.suffix!r}; expected .npz or .h5")
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    try:
        arrays = _read_npz(path) if path.suffix == ".npz" else _read_h5(path)
    except (ValueError, OSError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a weights file of Keras: {error}") from error
    if not arrays:
        raise ValueError(f"{path} is not a weights file of Keras: it has no variables")
    return arrays


def _read_npz(path: Path) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no archive as np.savez writes it")
    with np.load(path) as file:
        return dict(file)


def _read_h5(path: Path) -> dict[str, Array]:
    import h5py  # here: most runs read no such file

    def names(group: Any, key: str) -> list[str]:
        # Keras splits a list that is too long for one attribute into key0, key1, ...
        parts = [f"{key}{index}" for index in range(len(group.attrs))]
        keys = [name for name in [key, *parts] if name in group.attrs]
        if not keys:
            raise ValueError(f"its group {group.name} has no attribute {key}, which save_weights of Keras 2 writes")
        values = [value for key in keys for value in group.attrs[key]]
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values]

    with h5py.File(path) as file:
        root = file.get("model_weights", file)
        return {
            f"{layer}/{variable.rsplit('/', 1)[-1]}": np.asarray(root[layer][variable][()])
            for layer in names(root, "layer_names")
            for variable in names(root[layer], "weight_names")
        }
