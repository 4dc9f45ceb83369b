"""From a path to arrays by name: the file of a directory that holds the weights, and the reader that a file needs."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import MOST_TENSORS, open_weights, open_zip, read_json
from tinyvit.checkpoints.readers.npz import read_npz
from tinyvit.checkpoints.readers.safetensors import looks_like_safetensors, read_safetensors
from tinyvit.checkpoints.readers.torch_file import TorchFile, describe
from tinyvit.files.plain_pickle import as_text

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
STANDARD = (  # names that Transformers and timm give a directory's weights, the best first
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "pytorch_model.pth", "model.pth",
)  # fmt: skip
TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")
ENDINGS = (".safetensors", ".npz", *TORCH)
AVERAGED = ("state_dict_ema", "model_ema")
NESTED = (*AVERAGED, "state_dict", "model")  # keys of the weights in a checkpoint, in timm's order
# What torch's wrappers add to names: data parallelism at the front, the others also inside.
INSIDE = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPERS = re.compile(rf"^((module|{INSIDE})\.)+|(?<=\.)(({INSIDE})\.)+")
BACKBONE = "backbone."  # before every name when the model is a part of another
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


@dataclass
class WeightFiles:
    """The weights of another library's checkpoint and what describes them.

    Attributes:
        path: the file or the directory.
        arrays: the weights by the names that their writer gave them.
        config: config.json beside them, {} without one.
        preprocessor: preprocessor_config.json beside them, {} without one.
        overrides: fields of our config that the caller gives, for what the files do not say.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)


def read_weight_files(path: Path, overrides: Mapping[str, Any]) -> WeightFiles:
    """The weights at `path`, a file or a directory with one set of weights. Raises CheckpointError."""
    if not path.is_dir() and path.name not in STANDARD:
        return WeightFiles(path, read_weights(path), overrides=overrides)
    folder = path if path.is_dir() else path.parent
    config, preprocessor = (
        read_json(folder / name) if (folder / name).exists() else {} for name in (CONFIG, PREPROCESSOR)
    )
    arrays = read_weights(find_weights(folder) if path.is_dir() else path)
    return WeightFiles(path, arrays, config, preprocessor, overrides)


def find_weights(folder: Path) -> Path:
    """The file that holds a directory's weights. Raises CheckpointError."""
    for name in STANDARD:
        if (folder / name).exists():
            return folder / name
    found = sorted(child for child in folder.iterdir() if child.suffix in ENDINGS and child.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder}: holds several files of weights ({names}): give one of them")
    if not found:
        raise CheckpointError(f"{folder}: not a checkpoint (it holds neither a run nor {STANDARD[0]} or {STANDARD[2]})")
    return found[0]


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, or of the files that an index names, without what wrappers add to their names."""
    arrays = read_shards(path) if path.suffix == ".json" else read_file(path)
    names = {name: WRAPPERS.sub("", name) for name in arrays}
    names = {name: plain for name, plain in names.items() if plain != COUNTER}
    if names and all(plain.startswith(BACKBONE) for plain in names.values()):
        names = {name: plain.removeprefix(BACKBONE) for name, plain in names.items()}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{path}: two of its tensors have the same name but for what wrappers add (module., …)")
    return {plain: arrays.pop(name) for name, plain in names.items()}


def read_file(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file. Its first bytes say what it is; its name counts only where they leave it open."""
    with open_weights(path) as file:
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
        with open_weights(path) as file:
            return any(name.endswith(".npy") for name in open_zip(file).namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return path.suffix == ".npz"


def read_shards(index: Path) -> dict[str, np.ndarray]:
    """The arrays of all the files that an index names. Raises CheckpointError."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        what = "an index of weight files, whose weight_map says which file beside it holds which weights"
        raise CheckpointError(f"{index}: expected a checkpoint, a run directory or {what}")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: it names {name}, which is missing")
        found = read_file(index.parent / name)
        arrays |= {key: array for key, array in found.items() if places.get(key, name) == name}
    if lost := sorted(name for name in places if name not in arrays):
        raise CheckpointError(f"{index}: its files lack {', '.join(lost[:3])}{' …' if lost[3:] else ''}")
    return arrays


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, bare or in a checkpoint under one of the NESTED names. Raises CheckpointError."""
    with open_weights(path) as opened:
        file = TorchFile(path, opened)
        content = weights_in(file.content, path)
        return {as_text(name): file.read(as_text(name), value) for name, value in content.items()}


def weights_in(content: Any, path: Path) -> dict[Any, Any]:
    """The state dict in the content of a torch file. Raises CheckpointError."""
    for name in 2 * NESTED:  # some are nested twice
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            if name in AVERAGED and any(isinstance(content.get(other), dict) for other in ("state_dict", "model")):
                said = f"{path}: holds weights and averaged ones: those under {name} are read"
                warnings.warn(said, stacklevel=3)
            content = content[name]
    if not isinstance(content, dict):
        expected = "expected a state dict, as torch.save(model.state_dict(), path) writes it"
        raise CheckpointError(f"{path}: holds {describe(content)}, {expected}")
    if not all(isinstance(name, str | bytes) for name in content) or len(content) > MOST_TENSORS:
        raise CheckpointError(f"{path}: holds a dictionary that is no state dict")
    return content
