"""A checkpoint of ours as one safetensors file: tensors by name, and one JSON object under the key "tinyvit"."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import reason
from tinyvit.checkpoints.readers.safetensors import read_safetensors
from tinyvit.files.atomic import atomic_write


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` and `metadata` (anything that JSON can say) as one safetensors file, whole or not at all.

    Raises OSError when the file cannot be written (a full disk, a missing directory).
    """
    from safetensors.numpy import save as serialise

    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    content = serialise(contiguous, metadata={"tinyvit": json.dumps(metadata)})
    with atomic_write(path) as beside:  # not save_file, which leaves files of its own beside when it is killed
        beside.write_bytes(content)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: a dtype that NumPy lacks
        raise CheckpointError(f"{path}: not a readable safetensors file ({reason(error)})") from None


def _metadata(path: str | os.PathLike[str], file: Any) -> dict[str, Any]:
    try:
        metadata = json.loads(file.metadata()["tinyvit"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: not a checkpoint of tinyvit (its metadata describes no model)") from None
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: its metadata is damaged")
    return metadata


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save` wrote, without the tensors. Raises CheckpointError."""
    with opened(path) as file:
        return _metadata(path, file)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and metadata that `save` wrote. Raises CheckpointError."""
    metadata = read_metadata(path)
    return read_safetensors(Path(path)), metadata
