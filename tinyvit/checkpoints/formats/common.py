"""What the layouts of other libraries share."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.common import reason
from tinyvit.checkpoints.readers.weight_files import WeightFiles
from tinyvit.files.atomic import atomic_write, new_directory, write_text
from tinyvit.models.resnet import MOST_STAGES

MOST_CLASSES = 1_000_000
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@contextlib.contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Raise CheckpointError, with the problem and its reason, for what reading strange files can raise."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{problem}: {reason(error)}") from None


def renamed(files: WeightFiles, our_name: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The arrays of `files` under our names, taken out of it. Raises CheckpointError when two get one name."""
    state: dict[str, np.ndarray] = {}
    for name in list(files.arrays):
        ours = our_name(name)
        if ours in state:
            raise CheckpointError(f"{files.path}: {name} and another of its names both mean {ours}")
        state[ours] = files.arrays.pop(name)
    return state


def pack_qkv(state: dict[str, np.ndarray]) -> None:
    """Replace each attention's query, key and value, (D, D) and (D,) each, by qkv, (3 D, D) and (3 D,)."""
    for query in [name for name in state if ".attn.query." in name]:
        names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        parts = [state[name] for name in names if name in state and state[name].ndim]
        if len(parts) == 3 and len({part.shape[1:] for part in parts}) == 1:
            state[query.replace(".query.", ".qkv.")] = np.concatenate([state.pop(name) for name in names])


def split_qkv(state: dict[str, np.ndarray]) -> None:
    """Undo pack_qkv."""
    for packed in [name for name in state if ".attn.qkv." in name]:
        parts = np.split(state.pop(packed), 3)
        state |= {packed.replace(".qkv.", f".{p}."): a for p, a in zip(("query", "key", "value"), parts, strict=True)}


def resnet_layers(state: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
    """Blocks in each stage of the ResNet before the patches; None without one. Raises ValueError for many stages."""
    if not any(name.startswith("patch_embed.backbone.") for name in state):
        return None
    found = (re.match(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.", name) for name in state)
    blocks = {(int(match[1]), int(match[2])) for match in found if match}
    stages = 1 + max((stage for stage, _ in blocks), default=-1)
    if stages > MOST_STAGES:
        raise ValueError(f"its ResNet has {stages} stages, expected at most {MOST_STAGES}")
    return tuple(sum(stage == i for stage, _ in blocks) for i in range(stages))


def stem(state: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first kernel of the ResNet before the patches. Raises KeyError."""
    short = "patch_embed.backbone.conv.weight"
    return state[short] if short in state else state["patch_embed.backbone.stem.conv.weight"]


def mlp_ratio(hidden: int, dim: int) -> float:
    """`hidden / dim`, such that `int(dim * ratio)` is `hidden` in spite of rounding."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def square_grid(patches: int) -> tuple[int, int]:
    """Rows and columns of a square of patches. Raises ValueError for another number."""
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise ValueError(f"{patches} position embeddings of patches make no square")
    return side, side


def without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are null, which mean the same as none."""
    return {name: value for name, value in values.items() if value is not None}


def count_blocks(state: Mapping[str, np.ndarray]) -> int:
    """The model's depth. Raises ValueError for a number of too many digits."""
    return 1 + max((int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))), default=0)


def count_classes(state: Mapping[str, np.ndarray], name: str) -> int:
    """The outputs of the head, of which `name` is an array; 0 without a head. Raises TypeError or ValueError."""
    count = len(state[name]) if name in state else 0
    if count > MOST_CLASSES:
        raise ValueError(f"{name} has {count} classes, expected at most {MOST_CLASSES}")
    return count


def names_of_classes(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """`names` where there is one for each of `count` classes, else their numbers."""
    return names if len(names) == count else tuple(map(str, range(count)))


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file as torch's libraries expect it, whole or not at all."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    with atomic_write(path) as beside:
        beside.write_bytes(save(contiguous, metadata={"format": "pt"}))


def write_directory(path: Path, weights: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
    """Write model.safetensors and text files into the new directory `path`, all or nothing."""
    with new_directory(path) as beside:
        write_weights(beside / "model.safetensors", weights)
        for name, text in texts.items():
            write_text(beside / name, text + "\n")
