"""Opening a checkpoint, whichever library wrote it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tinyvit.checkpoints import hub
from tinyvit.checkpoints.checkpoint import BEST, LAST, Checkpoint, CheckpointError
from tinyvit.checkpoints.formats import read_other
from tinyvit.checkpoints.native_file import is_ours, read_checkpoint
from tinyvit.checkpoints.readers.common import open_weights
from tinyvit.checkpoints.readers.safetensors import looks_like_safetensors
from tinyvit.models.registry import list_models
from tinyvit.models.vit import VisionTransformer

MOST_PATCHES = 1 << 18  # rotary positions are computed: no weight shows how many there are


def open_checkpoint(path: str | os.PathLike[str], **overrides: Any) -> Checkpoint:
    """Read the weights, the config and the preprocessing at `path`.

    Args:
        path: a run directory, of which the best weights are read and without them the last; a checkpoint; or a name of
            the Hugging Face hub, "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION".
        overrides: fields of the config, for what the files do not say (None: not given): num_heads and image_size. A
            guess is warned of.

    Raises:
        CheckpointError: it cannot be read, or says another number of heads; the message is one line.
    """
    path = hub.fetch(str(path)) if str(path).startswith(hub.PREFIX) else Path(path)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    try:
        run_file = find_run_file(path)
        checkpoint = read_other(path, overrides) if run_file is None else read_checkpoint(run_file)
    except FileNotFoundError:
        named = "; it names a model, and weights are wanted" if str(path) in list_models() else ""
        raise CheckpointError(f"{path}: there is no such run or checkpoint{named}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    check_sizes(checkpoint)
    said = checkpoint.config.num_heads
    if (heads := overrides.get("num_heads", said)) != said:  # no weight would show the mistake
        problem = f"its model has {said} attention heads, not {heads}: leave num_heads (--num-heads) out"
        raise CheckpointError(f"{path}: {problem}")
    return checkpoint


def find_run_file(path: Path) -> Path | None:
    """The file of ours at `path`, or None for another library's checkpoint. Raises CheckpointError or OSError."""
    path.stat()
    if path.is_dir():
        return next((path / name for name in (BEST, LAST) if (path / name).exists()), None)
    with open_weights(path) as file:
        head = file.read(16)
    return path if looks_like_safetensors(head) and is_ours(path) else None


def check_sizes(checkpoint: Checkpoint) -> None:
    """Refuse a config that describes a much larger model than the weights, before one is built.

    Raises:
        CheckpointError: the config needs far more weights, or has more patches than images have.
    """
    config = checkpoint.config
    if config.num_patches > MOST_PATCHES:
        raise CheckpointError(
            f"{checkpoint.path}: its images of {config.image_size} have {config.num_patches} patches, "
            f"expected at most {MOST_PATCHES}"
        )
    held = sum(array.size for array in checkpoint.state.values())
    if config.num_weights > 2 * held + 1_000_000:  # fewer missing weights are named when the model is built
        problem = f"its config describes {config.num_weights} weights, and it holds {held}"
        raise CheckpointError(f"{checkpoint.path}: {problem}")


def load_model(path: str | os.PathLike[str], *, interpolation: str = "bicubic", **overrides: Any) -> VisionTransformer:
    """The model saved at `path`, in eval mode: a run directory (its best weights), a checkpoint, or one of the hub.

    Checkpoints are files of ours, Hugging Face directories (ViT, DeiT, ViTMAE, CLIP, SigLIP, DINOv2, DINOv3), timm's
    .safetensors, .pth and hub directories, and Google's .npz; the content of a file decides what it is.
    `model.class_names` and `model.preprocessing` describe the outputs and the inputs.

    Args:
        path: a file or a directory, or "hf:OWNER/NAME" with the extra `hub`.
        interpolation: how position embeddings are resized: "bicubic", or "bilinear" as in the original JAX code.
        overrides: replace fields of the config: `drop_path=0.1`; `num_classes=0` for the feature before the head,
            another number for a new head of zeros; `image_size=384` or `patch_size=8` resizes what depends on it.

    Raises:
        CheckpointError: the file cannot be read or does not fit; the message is one line.
        TypeError, ValueError: overrides that make no model.
    """
    return open_checkpoint(path, **overrides).build(interpolation=interpolation, copy=False, **overrides)
