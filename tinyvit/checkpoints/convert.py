"""Writing a checkpoint in the layout of another library, or in ours."""

from __future__ import annotations

from pathlib import Path

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.formats import WRITERS
from tinyvit.checkpoints.loading import open_checkpoint


def convert(src: Path, dst: Path, to: str) -> None:
    """Write the checkpoint at `src` to the new path `dst` in the layout `to`, one of WRITERS.

    Raises CheckpointError when `src` cannot be read or its model not be said in that layout, OSError, and ValueError
    for an unknown layout.
    """
    if to not in WRITERS:
        raise ValueError(f"unknown layout {to!r}, expected one of {', '.join(WRITERS)}")
    if dst.exists():
        raise CheckpointError(f"{dst}: exists already, choose another name")
    checkpoint = open_checkpoint(src)
    checkpoint.build(copy=False)  # complete, finite, and of the right shapes
    WRITERS[to](checkpoint, dst)
