"""safetensors files: the length of a JSON header, the header, the numbers.

The safetensors library reads the header first, and refuses gaps, overlaps and bytes that belong to no tensor. The
numbers are read here, because the library gives no bfloat16 without torch, and copies arrays out of a mapping of the
whole file, which doubles the memory. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import contextvars
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import DTYPES, check_count, open_weights, read_bytes, widen
from tinyvit.files.text import one_line

LONGEST_HEADER = 8_000_000  # bytes; the library allows 100 MB, of which it needs a multiple in memory

_mapped: contextvars.ContextVar[bool] = contextvars.ContextVar("tinyvit_mapped", default=False)


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Within this context tensors are mapped: pages of the file, which the system reads, drops and shares as it needs.

    For a process that ends soon: whoever overwrites the file in place changes them, and whoever cuts it kills the
    process. What the process writes into them stays its own.
    """
    token = _mapped.set(True)
    try:
        yield
    finally:
        _mapped.reset(token)


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
        raise CheckpointError(f"{path}: not a readable safetensors file: {one_line(error)}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file. Raises CheckpointError."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors by name, each in memory of its own or `mapped`; bfloat16 as float32. Raises CheckpointError."""
    with open_safetensors(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))  # the library has checked it
        header.pop("__metadata__", None)
        check_count(len(header))
        pages = np.asarray(np.memmap(path, np.uint8, "c")) if _mapped.get() else None

        def read(start: int, size: int) -> np.ndarray:
            return read_bytes(file, start, size) if pages is None else pages[start : start + size]

        return {name: read_tensor(read, 8 + length, name, entry) for name, entry in header.items()}


def read_tensor(read: Callable[[int, int], np.ndarray], start: int, name: str, entry: dict[str, Any]) -> np.ndarray:
    """One tensor; `read` gives bytes, the numbers begin at `start`. Raises ValueError for a dtype that NumPy lacks."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name[:100]} is of dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    first, end = entry["data_offsets"]
    numbers = read(start + first, end - first).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    numbers = numbers if numbers.flags.aligned else numbers.copy()
    return widen(numbers) if entry["dtype"] == "BF16" else numbers
