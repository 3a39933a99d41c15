"""Read weight files written by Keras as arrays by name."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SUFFIXES = (".npz", ".h5", ".hdf5", ".keras")
_KERAS_MEMBER = "model.weights.h5"
"""Weights in a .keras archive."""
_NO_LAYERS = ("optimizer", "metrics", "compile_metrics", "seed_generator")
"""Groups that a file in Keras' newer format has besides layers."""


def read_keras_file(path: Path) -> dict[str, Array]:
    """Read all variables of a file by unique names.

    Names are "layer/variable:0" in .h5 of Keras 2, prefixed by the models around a nested layer
    ("model/layer/variable:0"); "layer/vars/0" in .keras and .weights.h5 of Keras 2.12 and later,
    which number the layers of each class; and in .npz whatever `np.savez` got.

    Args:
        path: .npz; .h5 of `model.save_weights` or `model.save`; .keras.

    Raises:
        ValueError: no such file, another suffix, or not a file of Keras.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the weights file {path} ends in {path.suffix!r}; expected {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    try:
        arrays = _read_npz(path) if path.suffix == ".npz" else _read_h5(_hdf5_in(path))
    except Exception as error:  # of many kinds: groups, arrays and archives may be anything
        raise ValueError(f"{path} is not a weights file of Keras: {error}") from error
    if not arrays:
        raise ValueError(f"{path} is not a weights file of Keras: it has no variables")
    return arrays


def _read_npz(path: Path) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not an archive written by np.savez")
    with np.load(path) as file:
        if twice := [name for name in file.files if file.files.count(name) > 1]:
            raise ValueError(f"it has {twice[0]} twice")
        return dict(file)


def _hdf5_in(path: Path) -> Path | io.BytesIO:
    """Return the HDF5 file: `path` itself, or the one in a .keras archive."""
    if path.suffix != ".keras":
        return path
    with zipfile.ZipFile(path) as archive:
        if _KERAS_MEMBER not in archive.namelist():
            raise ValueError(f"it holds no {_KERAS_MEMBER}")
        return io.BytesIO(archive.read(_KERAS_MEMBER))


def _read_h5(source: Path | io.BytesIO) -> dict[str, Array]:
    import h5py  # imported here: most runs read no such file

    with h5py.File(source) as file:
        root = file.get("model_weights", file)
        if any(name.startswith("layer_names") for name in root.attrs):
            return _read_named(root)
        found = {
            name: np.asarray(dataset[()])
            for name, dataset in _datasets(root, h5py.Dataset)
            if "/vars/" in f"/{name}" and name.split("/")[0] not in _NO_LAYERS
        }
        if not found:
            raise ValueError(
                "its group / has no attribute layer_names, as of Keras 2, and no groups called vars, as of later ones"
            )
        return found


def _datasets(group: Any, kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every data set below `group` with its path."""
    for name, item in group.items():
        if isinstance(item, kind):
            yield prefix + name, item
        else:
            yield from _datasets(item, kind, f"{prefix}{name}/")


def _read_named(root: Any) -> dict[str, Array]:
    """Read the variables that Keras 2 lists by name, nested ones in the group of their model."""
    arrays: dict[str, Array] = {}
    for layer in _names(root, "layer_names"):
        for variable in _names(root[layer], "weight_names"):
            scope, _, last = variable.rpartition("/")
            name = variable if variable.startswith(f"{layer}/") else f"{layer}/{variable}"
            if scope in ("", layer):
                name = f"{layer}/{last}"
            if name in arrays:
                raise ValueError(f"it lists {name} twice, so that one cannot be told from the other")
            arrays[name] = np.asarray(root[layer][variable][()])
    return arrays


def _names(group: Any, key: str) -> list[str]:
    # Keras splits a list that is too long for one attribute into key0, key1, ...
    parts = [f"{key}{index}" for index in range(len(group.attrs))]
    keys = [name for name in [key, *parts] if name in group.attrs]
    if not keys:
        raise ValueError(f"its group {group.name} has no attribute {key}, which save_weights of Keras 2 writes")
    values = [value for key in keys for value in group.attrs[key]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
