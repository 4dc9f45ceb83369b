"""Checkpoints of other libraries: a table of layouts, each recognised by the names of its weights.

A layout is a module with `recognises(names)`, `read(files)`, which gives a Checkpoint with our names and shapes, and
perhaps `write(checkpoint, path)`. `readers` find the file that holds the weights and read its bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.formats import google, huggingface, huggingface_writing, timm, timm_writing
from tinyvit.checkpoints.native_file import write_checkpoint
from tinyvit.checkpoints.readers.weight_files import read_weight_files

LAYOUTS: dict[str, ModuleType] = {"huggingface": huggingface, "timm": timm, "google": google}
WRITERS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "tinyvit": write_checkpoint,
    "timm": timm_writing.write,
    "huggingface": huggingface_writing.write,
}


def read_other(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of another library at `path`, a file or a directory.

    Args:
        path: the file or the directory.
        overrides: fields of the config, for what the files do not say.

    Raises:
        CheckpointError: it cannot be read, or is in no known layout.
    """
    files = read_weight_files(path, overrides)
    for name in [name for name, array in files.arrays.items() if not array.size]:
        if not name.endswith("register_tokens"):  # DINOv3's model without any has this
            raise CheckpointError(f"{path}: {name} has the shape {files.arrays[name].shape}, which holds no numbers")
        del files.arrays[name]
    layout = find_layout(files.arrays)
    first = next(iter(files.arrays), "").partition(".")[0] + "."
    if layout is None and all(name.startswith(first) for name in files.arrays):  # a model within another: "model.", …
        files.arrays = {name.removeprefix(first): array for name, array in files.arrays.items()}
        layout = find_layout(files.arrays)
    if layout is None:
        some = ", ".join(list(files.arrays)[:3])
        problem = f"not the weights of a ViT in a known layout ({', '.join(LAYOUTS)}): it holds {some or 'nothing'} …"
        raise CheckpointError(f"{path}: {problem}")
    checkpoint = layout.read(files)
    for name, array in checkpoint.state.items():  # in place: two copies of all weights are never in memory
        checkpoint.state[name] = floating(path, name, array)
    return dataclasses.replace(checkpoint, names_known=not only_numbers(checkpoint.class_names))


def find_layout(names: Collection[str]) -> ModuleType | None:
    """The layout in which weights of these names are."""
    return next((layout for layout in LAYOUTS.values() if layout.recognises(names)), None)


def only_numbers(names: tuple[str, ...]) -> bool:
    """Whether class names say nothing: 0, 1, … as we call the nameless, or LABEL_0, LABEL_1, … as Transformers does."""
    return all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(names))


def floating(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """An array as the model keeps it: contiguous, float32, or float64 if it is that. Raises CheckpointError."""
    if array.dtype.kind != "f":
        raise CheckpointError(f"{path}: {name} is of dtype {array.dtype}, expected floating-point numbers")
    return np.ascontiguousarray(array, np.float64 if array.dtype == np.float64 else np.float32).reshape(array.shape)
