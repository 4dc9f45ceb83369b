"""From a path to arrays by name: which file of a directory holds the weights, and which reader a file needs."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import read_json
from tinyvit.checkpoints.readers.npz import read_npz
from tinyvit.checkpoints.readers.safetensors import looks_like_safetensors, read_safetensors
from tinyvit.checkpoints.readers.torch_pickle import TorchFile

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
STANDARD = (  # names that Transformers and timm give a directory's weights, the best first
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "pytorch_model.pth", "model.pth",
)  # fmt: skip
TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")
ENDINGS = (".safetensors", ".npz", *TORCH)
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where weights lie in a checkpoint, in timm's order
WRAPPERS = ("module.", "_orig_mod.")  # what data parallelism and torch.compile put before each name


@dataclass
class Source:
    """Arrays under their writer's names, what the JSON files beside them say ({} without such a file), and what the
    caller says: `hints` are fields of our config."""

    path: Path
    arrays: dict[str, np.ndarray]
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)


def read_source(path: Path, hints: Mapping[str, Any]) -> Source:
    """The weights at `path`, a file or a directory with one set of weights. Raises CheckpointError."""
    if path.is_file() and path.name not in STANDARD:
        return Source(path, read_weights(path), hints=hints)
    folder = path if path.is_dir() else path.parent
    arrays = read_weights(find_weights(folder) if path.is_dir() else path)
    beside = [read_json(folder / name) if (folder / name).is_file() else {} for name in (CONFIG, PREPROCESSOR)]
    return Source(path, arrays, *beside, hints)


def find_weights(folder: Path) -> Path:
    """The file that holds a directory's weights. Raises CheckpointError."""
    for name in STANDARD:
        if (folder / name).is_file():
            return folder / name
    found = sorted(child for child in folder.iterdir() if child.suffix in ENDINGS and child.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder}: holds several files of weights ({names}): give one of them")
    if not found:
        raise CheckpointError(f"{folder}: not a checkpoint (it holds neither a run nor {STANDARD[0]} or {STANDARD[2]})")
    return found[0]


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, or of the files an index names."""
    arrays = read_shards(path) if path.suffix == ".json" else read_file(path)
    return {unwrapped(name): array for name, array in arrays.items()}


def read_file(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file. What it is shows in its first bytes; its name counts only where they leave it open."""
    with open(path, "rb") as file:
        head = file.read(16)
    if looks_like_safetensors(head):
        return read_safetensors(path)
    if head[:2] == b"PK" and is_npz(path):
        return read_npz(path)
    if head[:2] == b"PK" or head[:1] == b"\x80" or path.suffix in TORCH:
        return read_torch(path)
    if path.suffix == ".safetensors":  # for its message
        return read_safetensors(path)
    raise CheckpointError(f"{path}: not a checkpoint (expected a run, or a safetensors, torch or .npz file)")


def is_npz(path: Path) -> bool:
    """Whether a zip archive is NumPy's; one that cannot be opened goes by its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return path.suffix == ".npz"


def read_shards(index: Path) -> dict[str, np.ndarray]:
    """The arrays of all the files that an index names. Raises CheckpointError."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        raise CheckpointError(f"{index}: its weight_map does not say which file beside it holds which weights")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: it names {name}, which is missing")
        arrays |= read_file(index.parent / name)
    if lost := sorted(name for name in places if name not in arrays):
        raise CheckpointError(f"{index}: its files lack {', '.join(lost)}")
    return arrays


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, bare or in a checkpoint under one of the NESTED names. Raises CheckpointError."""
    file = TorchFile(path)
    content = file.content
    for name in 2 * NESTED:  # some are nested twice
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    return {str(name): file.read(str(name), value) for name, value in content.items()}


def unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
