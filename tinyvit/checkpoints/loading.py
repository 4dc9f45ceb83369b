"""Opening a checkpoint, whichever library wrote it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from tinyvit.checkpoints import formats
from tinyvit.checkpoints.checkpoint import BEST, LAST, TRAINING_PREFIXES, Checkpoint, CheckpointError
from tinyvit.checkpoints.native_file import opened, read
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.models.vit import VisionTransformer


def load_run(path: Path) -> Checkpoint:
    """A run directory (best weights, else the last ones) or one of its safetensors files."""
    if path.is_dir():
        path = path / BEST if (path / BEST).is_file() else path / LAST
    tensors, metadata = read(path)
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["config"].items()}
        config = ViTConfig(**fields)
        names = tuple(metadata["class_names"])
        if config.num_classes and len(names) != config.num_classes:
            raise ValueError(f"{len(names)} names for {config.num_classes} classes")
        return Checkpoint(
            path=path,
            config=config,
            state={name: array for name, array in tensors.items() if not name.startswith(TRAINING_PREFIXES)},
            class_names=names,
            preprocessing=Preprocessing.from_dict(metadata),
            split={key: metadata["split"][key] for key in ("val_fraction", "seed") if key in metadata["split"]},
            names_known=bool(metadata.get("names_known", True)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata describes no model ({one_line(error)})") from None


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory with weights, or a safetensors file with our metadata."""
    if path.is_dir():
        return (path / BEST).is_file() or (path / LAST).is_file()
    with contextlib.suppress(CheckpointError), opened(path) as file:
        return "tinyvit" in (file.metadata() or {})
    return False


def open_checkpoint(path: str | os.PathLike[str], **hints: Any) -> Checkpoint:
    """Read the weights, the config and the preprocessing at `path`. Raises CheckpointError.

    `hints` are fields of the config that help where the files do not tell (num_heads); a guess is warned of.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such run or checkpoint")
    if is_run(path):
        return load_run(path)
    return formats.open_foreign(path, hints)


def load_model(path: str | os.PathLike[str], *, interpolation: str = "bicubic", **overrides: Any) -> VisionTransformer:
    """The model saved at `path`, in eval mode: a run directory (its best weights) or a checkpoint.

    Checkpoints are files of ours, Hugging Face directories of ViT and DeiT, timm's .safetensors, .pth and hub
    directories, and Google's .npz; what it is shows in its content. `model.class_names` and `model.preprocessing` tell
    what its outputs and inputs are.

    Args:
        path: a file or a directory.
        interpolation: how position embeddings are resized: "bicubic", or "bilinear" as in the original JAX code.
        overrides: replace fields of the config: `drop_path=0.1`; `num_classes=0` for the feature before the head,
            another number for a new head of zeros; `image_size=384` or `patch_size=8` resizes what depends on it.

    Raises:
        CheckpointError: one line long, for what cannot be read or does not fit.
        TypeError, ValueError: overrides that make no model.
    """
    return open_checkpoint(path, **overrides).build(interpolation=interpolation, copy=False, **overrides)


def one_line(error: BaseException) -> str:
    """An error's message on one line (str of a KeyError would quote it)."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(message.split())
