"""What the layouts of other libraries share."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.native_file import write_safetensors
from tinyvit.checkpoints.readers.weight_files import WeightFiles
from tinyvit.files.atomic import new_directory, write_text
from tinyvit.files.text import one_line
from tinyvit.models.resnet import MOST_STAGES

Size = tuple[int, int]  # height and width
MOST_CLASSES = 1_000_000
QKV = ("query", "key", "value")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@contextlib.contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Raise CheckpointError, with the problem and its reason, for what reading strange files can raise."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{problem}: {one_line(error)}") from None


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
        names = [query.replace(".query.", f".{part}.") for part in QKV]
        parts = [state[name] for name in names if name in state and state[name].ndim]
        if len(parts) == 3 and len({part.shape[1:] for part in parts}) == 1:
            state[query.replace(".query.", ".qkv.")] = np.concatenate([state.pop(name) for name in names])


def split_qkv(state: dict[str, np.ndarray]) -> None:
    """Undo pack_qkv."""
    for packed in [name for name in state if ".attn.qkv." in name]:
        parts = np.split(state.pop(packed), 3)
        state |= {packed.replace(".qkv.", f".{p}."): a for p, a in zip(QKV, parts, strict=True)}


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


def find_grid(
    embedded: int,
    prefix: int,
    patch: tuple[int, int],
    stride: int = 1,
    known: Sequence[Size] = (),
    given: Sequence[Size] = (),
) -> tuple[dict[str, Any], bool]:
    """image_size, trim_image and no_embed_class for `embedded` position embeddings, and whether that is sure.

    They are of patches alone, or of `prefix` other tokens, too. The sizes in `known` are preferred, then those in
    `given`, then a square of patches. `stride` is that of the ResNet before the patches, 1 without one. Raises
    ValueError when nothing fits.
    """

    def square(patches: int) -> Size:
        side = math.isqrt(max(patches, 0)) * stride
        return side * patch[0], side * patch[1]

    tries = [(size, no_embed_class) for no_embed_class in (False, True) for size in known]
    tries += [*((size, False) for size in given), (square(embedded - prefix), False), (square(embedded), True)]
    for (height, width), no_embed_class in tries:
        features = -(-height // stride), -(-width // stride)  # rounded up
        rows, columns = features[0] // patch[0], features[1] // patch[1]
        count = rows * columns + (0 if no_embed_class else prefix)
        trim = (rows * patch[0], columns * patch[1]) != features
        if rows and count == embedded and not (trim and stride > 1):
            without = no_embed_class and prefix > 0
            found = {"image_size": (height, width), "no_embed_class": without, "trim_image": trim}
            return found, not without or (height, width) in [*known, *given]
    raise ValueError(f"{embedded} position embeddings do not fit a square of patches and {prefix} other tokens")


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


def write_directory(path: Path, weights: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
    """Write model.safetensors and text files into the new directory `path`, all or nothing."""
    with new_directory(path) as beside:
        write_safetensors(beside / "model.safetensors", weights, {"format": "pt"})  # as torch's libraries expect it
        for name, text in texts.items():
            write_text(beside / name, text + "\n")
