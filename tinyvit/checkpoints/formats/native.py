"""Writing a model of another library as one of ours."""

from __future__ import annotations

from pathlib import Path

from tinyvit.checkpoints.checkpoint import BEST, Checkpoint, describe
from tinyvit.checkpoints.native_file import save
from tinyvit.files.atomic import new_directory


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a safetensors file, or for a name without that ending a directory that opens as a run does."""
    c = checkpoint
    metadata = describe(c.config, c.class_names, c.preprocessing, c.split, c.names_known)
    if path.suffix == ".safetensors":
        save(path, checkpoint.state, metadata)
    else:
        with new_directory(path) as beside:
            save(beside / BEST, checkpoint.state, metadata)
