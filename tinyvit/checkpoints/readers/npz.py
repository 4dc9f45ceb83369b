"""NumPy's archives of arrays (.npz), in which Google published its models."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import reason, widen


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays by name; bfloat16, which NumPy writes as raw pairs of bytes, comes as float32. Raises CheckpointError.

    Arrays of Python objects, which are pickles, are refused.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: array(archive, name) for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything for a damaged file
        raise CheckpointError(f"{path}: not a readable .npz file: {reason(error)}") from None


def array(archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    numbers = archive[name]
    if not isinstance(numbers, np.ndarray):
        raise zipfile.BadZipFile(f"{name} is not an array")
    return widen(numbers.view(np.uint16)) if numbers.dtype == "V2" else numbers
