"""What the layouts of other libraries share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.readers.sources import Source
from tinyvit.files.atomic import atomic_write, new_directory, write_text

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def renamed(source: Source, our_name: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The source's arrays under our names; the source is left empty. Raises CheckpointError when two get one name."""
    state: dict[str, np.ndarray] = {}
    for name in list(source.arrays):
        ours = our_name(name)
        if ours in state:
            raise CheckpointError(f"{source.path}: {name} and another of its names both mean {ours}")
        state[ours] = source.arrays.pop(name)
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
    """Blocks in each stage of the ResNet before the patches; None without one."""
    if not any(name.startswith("patch_embed.backbone.") for name in state):
        return None
    found = {re.match(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.", name) for name in state} - {None}
    blocks = {tuple(map(int, match.groups())) for match in found}
    stages = 1 + max((stage for stage, _ in blocks), default=-1)
    return tuple(sum(stage == i for stage, _ in blocks) for i in range(stages))


def stem(state: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first kernel of the ResNet before the patches. Raises KeyError."""
    short = "patch_embed.backbone.conv.weight"
    return state[short] if short in state else state["patch_embed.backbone.stem.conv.weight"]


def mlp_ratio(hidden: int, dim: int) -> float:
    """`hidden / dim`, such that `int(dim * ratio)` is `hidden` in spite of rounding."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


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
