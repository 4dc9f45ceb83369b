"""What the readers of weight files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError


def reason(error: BaseException) -> str:
    """An error's message as one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, given as uint16, as the float32 of the same value."""
    wide = bits.astype(np.uint32, order="C")
    return np.left_shift(wide, 16, out=wide).view(np.float32)


def read_into(file: BinaryIO, start: int, content: np.ndarray) -> None:
    """Fill the bytes `content` from `start` of an unbuffered file. Raises ValueError when the file ends before."""
    file.seek(start)
    view, done = memoryview(content), 0
    while done < len(view):
        count = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("the file is cut short")
        done += count


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content
