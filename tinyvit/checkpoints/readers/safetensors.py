"""safetensors files: the length of a JSON header, the header, the numbers.

The safetensors package reads them too, but not bfloat16 without torch, and not into memory of the caller's own.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import read_into, reason, widen

LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors package
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins like this may be one: after a sensible length comes an object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors by name, each in memory of its own; bfloat16 comes as float32. Raises CheckpointError."""
    try:
        with open(path, "rb", buffering=0) as file:
            header, start = read_header(file)
            return {name: tensor(file, start, name, entry) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {reason(error)}") from None


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the numbers begin. Raises ValueError."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("the file is cut short")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}, expected an object")
    return header, 8 + length


def tensor(file: BinaryIO, start: int, name: str, entry: dict[str, Any]) -> np.ndarray:
    """One tensor. Raises ValueError, KeyError or TypeError when its entry in the header is damaged."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    dtype = np.dtype(DTYPES[entry["dtype"]])
    shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
    size = math.prod(shape) * dtype.itemsize
    if min(first, *shape, 0) < 0 or end - first != size:
        raise ValueError(f"{name} has {end - first} bytes, expected {size} for the shape {shape}")
    content = np.empty(size, np.uint8)
    read_into(file, start + first, content)
    numbers = content.view(dtype).reshape(shape)
    return widen(numbers) if entry["dtype"] == "BF16" else numbers
