"""NumPy's archives of arrays (.npz), in which Google published its models."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import open_weights, open_zip, widen
from tinyvit.files.text import one_line

FACTOR, SPARE = 2, 1 << 26  # an archive unpacks to at most FACTOR times its size and SPARE bytes: weights hardly shrink


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays by name; bfloat16, which NumPy writes as raw pairs of bytes, comes as float32. Raises CheckpointError.

    Arrays of Python objects, which are pickles, are refused.
    """
    try:
        with open_weights(path) as file:
            archive = open_zip(file)
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if size > FACTOR * path.stat().st_size + SPARE:
                raise ValueError(f"it unpacks to {size} bytes, more than {FACTOR} times its size")
            return {member.filename.removesuffix(".npy"): read_array(archive, member) for member in members}
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything for a damaged file
        raise CheckpointError(f"{path}: not a readable .npz file: {one_line(error)}") from None


def read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The array in a member of the archive. Raises ValueError and other errors."""
    name = member.filename[:100]
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy does not use")
    with archive.open(member) as file:
        numbers = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # at its end, the checksum is compared
            raise ValueError(f"{name} is longer than it says")
    return widen(numbers.view(np.uint16)) if numbers.dtype == "V2" else numbers
