"""Checkpoints of other libraries: a table of layouts, each recognised by the names of its weights.

A layout is a module with `recognises(names)`, `read(source)`, which gives a Checkpoint with our names and shapes, and
perhaps `write(checkpoint, path)`. Which file holds the weights and how its bytes are read is `sources`' business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.formats import google, huggingface, native, timm
from tinyvit.checkpoints.readers.sources import read_source

LAYOUTS: dict[str, ModuleType] = {"huggingface": huggingface, "timm": timm, "google": google}
WRITERS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "tinyvit": native.write,
    "timm": timm.write,
    "huggingface": huggingface.write,
}


def open_foreign(path: Path, hints: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of another library at `path`, a file or a directory. Raises CheckpointError.

    `hints` are fields of the config that help where the files do not tell.
    """
    source = read_source(path, hints)
    for layout in LAYOUTS.values():
        if layout.recognises(source.arrays):
            checkpoint = layout.read(source)
            for name, array in checkpoint.state.items():  # in place: never are two copies of all weights in memory
                checkpoint.state[name] = floating(path, name, array)
            return dataclasses.replace(checkpoint, names_known=not only_numbers(checkpoint.class_names))
    some = ", ".join(list(source.arrays)[:3])
    raise CheckpointError(
        f"{path}: not the weights of a ViT in a known layout ({', '.join(LAYOUTS)}): it holds {some or 'nothing'} …"
    )


def only_numbers(names: tuple[str, ...]) -> bool:
    """Whether class names say nothing: 0, 1, … as we call the nameless, or LABEL_0, LABEL_1, … as Transformers does."""
    return all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(names))


def floating(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """An array as the model keeps it: contiguous, float32, or float64 if it is that. Raises CheckpointError."""
    if array.dtype.kind != "f":
        raise CheckpointError(f"{path}: {name} is of dtype {array.dtype}, expected floating-point numbers")
    return np.ascontiguousarray(array, np.float64 if array.dtype == np.float64 else np.float32).reshape(array.shape)
