"""Directories of Hugging Face Transformers: ViTModel, ViTForImageClassification, DeiT's three counterparts and
ViTMAE's encoder.

Differences from our layout: queries, keys and values are three matrices, names differ, and the shape of the model
stands in config.json. A DeiT without the teacher's head reads nothing from its distillation token, which makes it a
register token of ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.formats.common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    count_classes,
    mlp_ratio,
    pack_qkv,
    renamed,
)
from tinyvit.checkpoints.formats.huggingface_names import UNUSED, our_name
from tinyvit.checkpoints.formats.huggingface_preprocessing import read_preprocessing
from tinyvit.checkpoints.readers.common import reason
from tinyvit.checkpoints.readers.weight_files import CONFIG, WeightFiles
from tinyvit.files.fields import boolean, checked, either, integer, list_of, number, one_of, optional, text
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing

TELLING = ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings")
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}  # fmt: skip
DEIT = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, crop_pct=0.875, crop_mode="squash")
DEFAULT_CLASSES = 2  # when config.json says nothing


def names_by_number(value: Any) -> dict[str, Any]:
    """id2label: an object, of any values."""
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


PIXELS = either(integer(1, 65536), list_of(integer(1, 65536), 2, 2))
FIELDS = {  # of config.json
    "model_type": one_of("vit", "deit", "vit_mae"),
    "architectures": optional(list_of(text, 0, 100)),
    "id2label": optional(names_by_number),
    "hidden_act": one_of(*ACTIVATIONS),
    "pooler_act": text,
    "image_size": PIXELS,
    "patch_size": PIXELS,
    "num_channels": integer(1, 1024),
    "hidden_size": integer(1, 65536),
    "num_hidden_layers": integer(1, 10_000),
    "num_attention_heads": integer(1, 65536),
    "intermediate_size": integer(1, 1 << 20),
    "qkv_bias": boolean,
    "layer_norm_eps": number(0, 1),
    "hidden_dropout_prob": number(0, 1),
    "attention_probs_dropout_prob": number(0, 1),
}


def recognises(names: Collection[str]) -> bool:
    return any(name.endswith(TELLING) for name in names)


def read(files: WeightFiles) -> Checkpoint:
    """The model that config.json describes. Raises CheckpointError."""
    if not files.config:
        raise CheckpointError(f"{files.path}: Transformers' weights need their config.json beside them")
    try:
        given = checked(files.config, FIELDS, required=["model_type"])
    except ValueError as error:
        raise CheckpointError(f"{files.path}: its {CONFIG} describes no model: {reason(error)}") from None
    for name in [name for name in files.arrays if UNUSED.match(name)]:
        del files.arrays[name]
    state = renamed(files, our_name)
    pack_qkv(state)
    names = given.get("id2label")
    expected = DEFAULT_CLASSES if names is None else len(names)
    classifies = "head.weight" in state or (
        "ForImageClassification" in str(given.get("architectures")) and expected > 0
    )
    if classifies:  # Transformers, too, passes over a pooler then
        state = {name: array for name, array in state.items() if not name.startswith("pre_logits.")}
    if classifies and "dist_token" in state and "head_dist.weight" not in state:
        state["reg_token"] = state.pop("dist_token")
    try:
        count = count_classes(state, "head.weight") or (expected if classifies else 0)
        config = read_config(given, count, state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{files.path}: its {CONFIG} describes no model: {reason(error)}") from None
    return Checkpoint(
        path=files.path,
        config=config,
        state=state,
        class_names=class_names(files.path, names or {}, count),
        preprocessing=read_preprocessing(files, config, DEIT if given["model_type"] == "deit" else None),
    )


def class_names(path: Path, names: dict[str, Any], count: int) -> tuple[str, ...]:
    """The names in id2label. If its keys are not exactly 0 to `count - 1`, the classes are numbered, with a warning."""
    unnamed = tuple(f"LABEL_{i}" for i in range(count))
    if names.keys() != {str(i) for i in range(count)}:
        if names and count:
            problem = f"the keys of id2label are not the numbers 0 to {count - 1}"
            warnings.warn(f"{path}: {problem}: the classes are called LABEL_0, LABEL_1, …", stacklevel=2)
        return unnamed
    found = (names[str(i)] for i in range(count))
    return tuple(
        str(name) if isinstance(name, str | int) else without for name, without in zip(found, unnamed, strict=True)
    )


def read_config(given: dict[str, Any], num_classes: int, state: dict[str, np.ndarray]) -> ViTConfig:
    """Our config for the checked fields of theirs. Raises ValueError."""
    embed_dim = given.get("hidden_size", 768)
    pooler = state.get("pre_logits.fc.weight")
    if pooler is not None and given.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"pooler_act is {given['pooler_act']!r}, expected tanh")
    dropout = given.get("hidden_dropout_prob", 0.0)
    return ViTConfig(
        image_size=given.get("image_size", 224),
        patch_size=given.get("patch_size", 16),
        in_chans=given.get("num_channels", 3),
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=given.get("num_hidden_layers", 12),
        num_heads=given.get("num_attention_heads", 12),
        mlp_ratio=mlp_ratio(given.get("intermediate_size", 3072), embed_dim),
        qkv_bias=given.get("qkv_bias", True),
        distilled="dist_token" in state,
        reg_tokens=int("reg_token" in state),
        act=ACTIVATIONS[given.get("hidden_act", "gelu")],
        norm_eps=given.get("layer_norm_eps", 1e-12),
        representation_size=None if pooler is None else len(pooler),
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=given.get("attention_probs_dropout_prob", 0.0),
    )
