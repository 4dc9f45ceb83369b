"""NumPy's archives of arrays (.npz), in which Google published its models."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import open_weights, open_zip, reason, widen

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
        raise CheckpointError(f"{path}: not a readable .npz file: {reason(error)}") from None


def read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The array in a member of the archive. Raises ValueError and other errors."""
    name = member.filename[:100]
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy does not use")
    with archive.open(member) as file:
        shape, dtype = read_header(file)
        start = file.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are read with allow_pickle only")
        if start + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"{name} has {member.file_size - start} bytes, which do not fit its shape {shape}")
        file.seek(0)
        numbers = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # at its end, the checksum is compared
            raise ValueError(f"{name} is longer than it says")
    return widen(numbers.view(np.uint16)) if numbers.dtype == "V2" else numbers


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and the dtype of the array in a .npy file. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its arrays are of version {version}, expected 1 or 2")
    shape, _, dtype = read(file)
    if len(shape) > 8 or min(shape, default=0) < 0:
        raise ValueError("an array has a shape that no weights have")
    return shape, dtype
