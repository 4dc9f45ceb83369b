"""safetensors files: the length of a JSON header, the header, the numbers.

The safetensors library reads the header first, and refuses gaps, overlaps and bytes that belong to no tensor. The
numbers are read here, because the library gives no bfloat16 without torch, and copies arrays out of a mapping of the
whole file, which doubles the memory. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import DTYPES, check_count, open_weights, read_bytes, reason, widen

LONGEST_HEADER = 8_000_000  # bytes; the library allows 100 MB, of which it needs a multiple in memory


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins like this may be one: after a length comes an object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """The file as the library opens it. Raises CheckpointError, also for any error within the block."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_weights(path) as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"its header has {length} bytes, expected at most {LONGEST_HEADER}")
        with safe_open(path, framework="numpy") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {reason(error)}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file. Raises CheckpointError."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors by name, each in memory of its own; bfloat16 comes as float32. Raises CheckpointError."""
    with open_safetensors(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))  # the library has checked it
        header.pop("__metadata__", None)
        check_count(len(header))
        return {name: read_tensor(file, 8 + length, name, entry) for name, entry in header.items()}


def read_tensor(file: Any, start: int, name: str, entry: dict[str, Any]) -> np.ndarray:
    """One tensor; the numbers begin at `start`. Raises ValueError for a dtype that NumPy lacks."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name[:100]} is of dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    first, end = entry["data_offsets"]
    numbers = read_bytes(file, start + first, end - first).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return widen(numbers) if entry["dtype"] == "BF16" else numbers
