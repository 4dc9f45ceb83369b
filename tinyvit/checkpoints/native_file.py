"""Our own checkpoints, each one safetensors file.

It holds the weights under their state-dict names, and in its metadata, under the key "tinyvit", one JSON object with
the model's config, its class names and preprocessing, and how its run divided the data. A training checkpoint
(`last.safetensors`) also holds tensors named `optimizer.…`, `ema.…` and `step.…`, and its position in the run under
"progress".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import (
    BEST,
    TRAINING_PREFIXES,
    Checkpoint,
    CheckpointError,
    checked_preprocessing,
    describe,
)
from tinyvit.checkpoints.readers.safetensors import read_metadata as read_strings
from tinyvit.checkpoints.readers.safetensors import read_safetensors
from tinyvit.data.base import Data
from tinyvit.files.atomic import atomic_write, new_directory
from tinyvit.files.fields import boolean, checked, integer, list_of, number, text
from tinyvit.files.reading import parse_json
from tinyvit.files.text import one_line
from tinyvit.models.config import FIELDS, ViTConfig
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.models.vit import VisionTransformer

KEY = "tinyvit"
OTHER_FILES = (".pth", ".pt", ".bin", ".ckpt", ".npz", ".onnx")  # which are not written
FORMAT = {"format": KEY}  # a second sign of our files: damage to the key alone does not make one another library's

SIMILARITY = {"scale": number(0, 1e30), "bias": number(-1e30, 1e30)}
SPLIT = {"val_fraction": number(0, 1), "seed": integer(0, 10**100), "images": integer(1, 10**12),
         "held_out": boolean}  # fmt: skip
METADATA = {
    "config": lambda values: checked(values, FIELDS),
    "class_names": list_of(text, 0, 1_000_000),
    "names_known": boolean,
    "split": lambda values: checked(values, SPLIT),
    "similarity": lambda values: checked(values, SIMILARITY),
}


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` and `metadata` (anything that JSON can hold) as one safetensors file, whole or not at all.

    Raises OSError when the file cannot be written (a full disk, a missing directory).
    """
    write_safetensors(path, tensors, {**FORMAT, KEY: json.dumps(metadata)})


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], strings: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; `strings` are its metadata."""
    from safetensors.numpy import save as serialise

    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    content = memoryview(serialise(contiguous, metadata=strings))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    header["__metadata__"] = dict(sorted(strings.items()))  # the library writes them in another order in each process
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with (
        atomic_write(path) as beside,
        open(beside, "wb") as file,
    ):  # not save_file, which leaves files when it is killed
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(content[start:])


def is_ours(path: Path) -> bool:
    """Whether a readable safetensors file has our metadata. Raises CheckpointError for one that is not readable."""
    strings = read_strings(path)
    return KEY in strings or FORMAT.items() <= strings.items()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save` wrote, without the tensors. Raises CheckpointError."""
    strings = read_strings(Path(path))
    if KEY not in strings:
        raise CheckpointError(f"{path}: not a checkpoint of tinyvit (its metadata describes no model)")
    try:
        return parse_json(strings[KEY])
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {error}") from None


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and metadata that `save` wrote. Raises CheckpointError."""
    metadata = read_metadata(path)
    return read_safetensors(Path(path)), metadata


def read_checkpoint(path: Path) -> Checkpoint:
    """The model in a file that `save` wrote. Raises CheckpointError."""
    tensors, metadata = read(path)
    try:
        found = checked(metadata, METADATA, required=("config", "class_names"))
        if unknown := sorted(metadata["config"].keys() - FIELDS.keys()):
            raise ValueError(f"this version of tinyvit knows no setting {unknown[0][:100]!r}")
        config, names = ViTConfig(**found["config"]), found["class_names"]
        if config.num_classes and len(names) != config.num_classes:
            raise ValueError(f"{len(names)} names for {config.num_classes} classes")
        return Checkpoint(
            path=path,
            config=config,
            state={name: array for name, array in tensors.items() if not name.startswith(TRAINING_PREFIXES)},
            class_names=names,
            preprocessing=checked_preprocessing(metadata, config.in_chans),
            split=found.get("split", {}),
            names_known=found.get("names_known", True),
            similarity=found.get("similarity", {}),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata describes no model ({one_line(error)})") from None


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a safetensors file, or for a name without that ending a directory that opens as a run does."""
    c = checkpoint
    metadata = describe(c.config, c.class_names, c.preprocessing, c.split, c.names_known)
    metadata |= {"similarity": c.similarity} if c.similarity else {}
    if path.suffix == ".safetensors":
        save(path, checkpoint.state, metadata)
    else:
        with new_directory(path) as beside:
            save(beside / BEST, checkpoint.state, metadata)


def save_model(model: VisionTransformer, path: str | os.PathLike[str], data: Data | None = None) -> None:
    """Write a model so that `load_model` and all commands open it.

    Args:
        model: its weights and config are written.
        path: a name that ends in .safetensors, which is replaced; another name is that of a new directory.
        data: the data set that it learned, which gives the class names and how images are prepared; None for those
            that the model was loaded with, or that `model.preprocessing` and `model.class_names` are set to.

    Raises:
        TypeError: the model is none of tinyvit's.
        ValueError: nothing says how images are prepared, the model and the data have other numbers of classes, weights
            do not fit `model.config` or are not finite, or `path` has the ending of another kind of file.
        OSError: the file cannot be written, or the directory is there already.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"save_model expects a model of create_model or load_model, got {type(model).__name__}")
    path = Path(path)
    if path.suffix in OTHER_FILES:
        raise ValueError(f"save_model writes a file that ends in .safetensors, or a new directory, got {path}")
    if path.suffix != ".safetensors" and path.exists():
        raise FileExistsError(f"{path} exists already: choose another name, or one that ends in .safetensors")
    config, names, preprocessing = model.config, model.class_names, model.preprocessing
    if data is not None:
        names, preprocessing = data.class_names, Preprocessing(data.mean, data.std, **data.fit_options)
    if preprocessing is None:
        raise ValueError(
            "nothing says how images are prepared for this model: give the data set that it learned (data=...), or set "
            "model.preprocessing = tinyvit.models.preprocessing.Preprocessing(mean, std)"
        )
    known = len(names) > 0
    names = names if known else tuple(map(str, range(config.num_classes)))
    if config.num_classes and len(names) != config.num_classes:
        raise ValueError(f"the model has {config.num_classes} outputs, the data {len(names)} classes")
    checkpoint = Checkpoint(path, config, model.state_dict(), names, preprocessing, {}, known)
    try:
        checkpoint.build(copy=False)
    except CheckpointError as error:
        raise ValueError(f"{error}: load_model could not open it (model.reset_classifier makes a new head)") from None
    write_checkpoint(checkpoint, path)
