"""Writing a checkpoint in the layout of another library, or in ours."""

from __future__ import annotations

from pathlib import Path

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.formats import WRITERS
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.checkpoints.native_file import OTHER_FILES


def convert(src: Path, dst: Path, to: str, *, num_heads: int | None = None) -> None:
    """Write the checkpoint at `src` to the new path `dst` in another layout.

    Args:
        src: a run or a checkpoint of any library.
        dst: a new directory, or a file that ends in .safetensors for the layouts "tinyvit" and "timm".
        to: the layout, one of WRITERS.
        num_heads: attention heads, for a checkpoint that does not say how many it has.

    Raises:
        CheckpointError: `src` cannot be read, `dst` exists, or the layout has no place for a part of the model.
        OSError: `dst` cannot be written.
        ValueError: an unknown layout.
    """
    if to not in WRITERS:
        raise ValueError(f"unknown layout {to!r}, expected one of {', '.join(WRITERS)}")
    if dst.exists():
        raise CheckpointError(f"{dst}: exists already, choose another name")
    if dst.suffix in OTHER_FILES:
        raise CheckpointError(f"{dst}: expected a new directory, or a file that ends in .safetensors")
    if to == "huggingface" and dst.suffix == ".safetensors":
        raise CheckpointError(f"{dst}: the layout huggingface is that of a directory, expected the name of a new one")
    checkpoint = open_checkpoint(src, num_heads=num_heads)
    checkpoint.build(copy=False)  # complete, finite, and of the right shapes
    WRITERS[to](checkpoint, dst)
