"""What the readers of weight files share."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.files import reading

# The NumPy dtype of each dtype that is read, under its name in safetensors; of bfloat16, that of its bits.
DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
    }.items()
}  # fmt: skip
MOST_TENSORS = 20_000  # in a file; a ViT-G with its optimizer's state and an average has some 3,000
LARGEST_DIRECTORY = 8_000_000  # bytes of a zip archive's list of members; a tensor takes about a hundred


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, given as uint16, as the float32 of the same value."""
    wide = bits.astype(np.uint32, order="C")
    return np.left_shift(wide, 16, out=wide).view(np.float32)


def read_bytes(file: BinaryIO, start: int, size: int) -> np.ndarray:
    """`size` bytes from `start` of a buffered file, (size,) uint8, in memory of their own. Raises ValueError."""
    content = np.empty(size, np.uint8)
    file.seek(start)
    if file.readinto(content.data) < size:  # type: ignore[attr-defined]  # which BinaryIO lacks
        raise ValueError("the file is cut short")
    return content


def open_weights(path: Path) -> BinaryIO:
    """Open a file of weights for reading. Raises CheckpointError, which says why it cannot be read."""
    try:
        return reading.open_regular(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        return reading.parse_json(reading.read_text(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def check_count(count: int) -> None:
    """Refuse a file of more tensors than any ViT has. Raises ValueError."""
    if count > MOST_TENSORS:
        raise ValueError(f"it holds {count} tensors, expected at most {MOST_TENSORS}")


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """A zip archive of a limited number of members. Raises ValueError or zipfile.BadZipFile."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # ZipFile would read a list of any length
    if end and end[5] > LARGEST_DIRECTORY:
        raise ValueError(f"its list of members has {end[5]} bytes, expected at most {LARGEST_DIRECTORY}")
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    check_count(len(names))
    if len(set(names)) < len(names):
        raise ValueError("it holds two members of one name")
    return archive
