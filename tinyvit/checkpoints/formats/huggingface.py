"""Directories of Hugging Face Transformers: ViTModel, ViTForImageClassification, DeiT's three counterparts and
ViTMAE's encoder.

Differences from our layout: queries, keys and values are three matrices, names differ, and the shape of the model
stands in config.json. A DeiT without the teacher's head reads nothing from its distillation token, which makes it a
register token of ours.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError, checked_preprocessing
from tinyvit.checkpoints.formats.common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    count_classes,
    mlp_ratio,
    pack_qkv,
    renamed,
    split_qkv,
    without_null,
    write_directory,
)
from tinyvit.checkpoints.readers.common import reason
from tinyvit.checkpoints.readers.weight_files import CONFIG, PREPROCESSOR, WeightFiles
from tinyvit.files.fields import boolean, checked, either, integer, list_of, number, one_of, optional, text
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing, share

TELLING = ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings")
NAMES = {  # theirs, after "vit." or "deit.", and ours
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "pooler.dense": "pre_logits.fc",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
BLOCK = {  # the same within a block
    "layernorm_before": "norm1",
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.q_proj": "attn.query",  # from here on: what Transformers 5 calls them in memory
    "attention.k_proj": "attn.key",
    "attention.v_proj": "attn.value",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
UNUSED = ("embeddings.mask_token",)  # for pre-training by masked images, as is MAE's decoder
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
DEFAULT_CLASSES = 2  # when config.json says nothing


def names_by_number(value: Any) -> dict[str, Any]:
    """id2label: an object, of any values."""
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def resized_size(value: Any) -> tuple[str, int]:
    """How images are resized ("squash" or "center"), and the height, or the shorter side, that they then have."""
    pixels = integer(1, 65536)
    if isinstance(value, dict):
        found = checked(value, {"shortest_edge": optional(pixels), "height": optional(pixels)})
        if found.get("shortest_edge"):
            return "center", found["shortest_edge"]
        value = found.get("height")
    return "squash", pixels(value)


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
PREPROCESSOR_FIELDS = {  # of preprocessor_config.json
    "image_mean": list_of(number(-1e6, 1e6), 1, 1024),
    "image_std": list_of(number(-1e6, 1e6), 1, 1024),
    "do_normalize": boolean,
    "do_rescale": boolean,
    "rescale_factor": number(1e-6, 1e6),
    "size": resized_size,
    "crop_size": resized_size,
    "do_center_crop": boolean,
    "resample": one_of(*RESAMPLE),
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
    for name in [name for name in files.arrays if base_name(name) in UNUSED or name.startswith("decoder.")]:
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
        preprocessing=read_preprocessing(files, given["model_type"], config),
    )


def base_name(name: str) -> str:
    return re.sub(r"^(vit|deit)\.", "", name)


def our_name(name: str) -> str:
    """Our name of a weight, or the name as it is when we have none."""
    module, _, kind = base_name(name).rpartition(".")
    if block := re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", module):
        number, part = block.groups()
        return f"blocks.{number}.{BLOCK[part]}.{kind}" if part in BLOCK else name
    if base_name(name) in NAMES:
        return NAMES[base_name(name)]
    return f"{NAMES[module]}.{kind}" if module in NAMES else name


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


def read_preprocessing(files: WeightFiles, model_type: str, config: ViTConfig) -> Preprocessing:
    """What preprocessor_config.json says; without one, the usual of the family. Raises CheckpointError."""
    if not files.preprocessor and model_type == "deit":
        return Preprocessing(IMAGENET_MEAN, IMAGENET_STD, crop_pct=0.875, crop_mode="squash")
    try:
        given = checked(without_null(files.preprocessor), PREPROCESSOR_FIELDS)
        mean, std = (given.get(f"image_{name}", (0.5,) * config.in_chans) for name in ("mean", "std"))
        if not given.get("do_normalize", True):
            mean, std = (0.0,) * config.in_chans, (1.0,) * config.in_chans
        # They scale pixels by rescale_factor, or not at all; we by 1 / 255.
        factor = round(255 * given.get("rescale_factor", 1 / 255), 9) if given.get("do_rescale", True) else 255.0
        mode, resized = given.get("size", ("squash", config.image_size[0]))
        crop = given.get("crop_size", (mode, resized))[1] if given.get("do_center_crop", False) else resized
        found = {
            "mean": tuple(m / factor for m in mean),
            "std": tuple(s / factor for s in std),
            "crop_pct": share(min(crop, resized), resized),
            "crop_mode": mode,
            "interpolation": RESAMPLE[given.get("resample", 2)],
        }
        return checked_preprocessing(found, config.in_chans)
    except ValueError as error:
        raise CheckpointError(f"{files.path}: its {PREPROCESSOR} cannot be followed: {reason(error)}") from None


# --- writing --------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json into the new directory `path`.

    Raises CheckpointError, naming it, for a part that Transformers' models do not have.
    """
    config, state = checkpoint.config, dict(checkpoint.state)
    if lacking := unsupported(config):
        raise CheckpointError(f"{path}: Transformers' ViT and DeiT have no {lacking}")
    if config.no_embed_class:  # the same as position embeddings of zero for the tokens in front
        zeros = np.zeros((1, config.num_prefix_tokens, config.embed_dim), np.float32)
        state["pos_embed"] = np.concatenate([zeros, state["pos_embed"]], axis=1)
    if "reg_token" in state:
        state["dist_token"] = state.pop("reg_token")
    split_qkv(state)
    kind = "deit" if "dist_token" in state else "vit"
    prefix = f"{kind}." if config.num_classes else ""
    weights = {their_name(name, prefix, config.distilled): array for name, array in state.items()}
    files = {
        CONFIG: json.dumps(write_config(checkpoint, kind), indent=2),
        PREPROCESSOR: json.dumps(write_preprocessing(checkpoint), indent=2),
    }
    write_directory(path, weights, files)


def unsupported(config: ViTConfig) -> str | None:
    """What the model has and theirs do not."""
    problems = {
        "ResNet before the patches (resnet_layers)": config.resnet_layers is not None,
        "layer scale (init_values)": config.init_values is not None,
        "convolutions before the tokens (conv_chans)": config.conv_chans is not None,
        "average pooling": config.global_pool != "token",
        f"{config.reg_tokens} register tokens": config.reg_tokens > (0 if config.distilled else 1),
        "layer between pooling and head (pre_logits)": config.representation_size and config.num_classes,
    }
    return next((what for what, present in problems.items() if present), None)


def their_name(name: str, prefix: str, teacher: bool) -> str:
    """Their name of one of our weights."""
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name):
        number, part, kind = block.groups()
        theirs = next(theirs for theirs, ours in BLOCK.items() if ours == part)
        return f"{prefix}encoder.layer.{number}.{theirs}.{kind}"
    module, kind = (name, "") if name in NAMES.values() else (name.rpartition(".")[0], f".{name.rpartition('.')[2]}")
    if module == "head":
        return f"{'cls_classifier' if teacher else 'classifier'}{kind}"
    theirs = next(theirs for theirs, ours in NAMES.items() if ours == module)
    return f"{theirs}{kind}" if module == "head_dist" else f"{prefix}{theirs}{kind}"


def write_config(checkpoint: Checkpoint, kind: str) -> dict[str, Any]:
    """config.json."""
    config, names = checkpoint.config, checkpoint.class_names
    family = "ViT" if kind == "vit" else "DeiT"
    task = "ForImageClassification" + ("WithTeacher" if config.distilled else "") if config.num_classes else "Model"

    def plain(pair: Any) -> int | list[int]:
        return pair[0] if pair[0] == pair[1] else list(pair)

    content: dict[str, Any] = {
        "architectures": [f"{family}{task}"],
        "model_type": kind,
        "image_size": plain(config.image_size),
        "patch_size": plain(config.patch_size),
        "num_channels": config.in_chans,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu" if config.act == "gelu" else "gelu_pytorch_tanh",
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.proj_drop_rate,
        "attention_probs_dropout_prob": config.attn_drop_rate,
    }
    if config.representation_size:
        content["pooler_output_size"] = config.representation_size
    if names:
        content["id2label"] = {str(i): name for i, name in enumerate(names)}
        content["label2id"] = {name: i for i, name in enumerate(names)}
    return content


def write_preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    """preprocessor_config.json: of the processors in Transformers, the one that cuts images as we do."""
    from tinyvit.data.image import usual_crop

    p, (height, width) = checkpoint.preprocessing, checkpoint.config.image_size
    crop_pct = usual_crop((height, width)) if p.crop_pct is None else p.crop_pct
    larger = [int(side / crop_pct) for side in (height, width)]
    cut = larger != [height, width]
    square = p.crop_mode == "squash"
    processor = "CLIPImageProcessor" if not square else "DeiTImageProcessor" if cut else "ViTImageProcessor"
    return {
        "image_processor_type": processor,
        "do_resize": True,
        "size": dict(zip(("height", "width"), larger, strict=True)) if square else {"shortest_edge": max(larger)},
        "do_center_crop": cut or not square,
        "crop_size": {"height": height, "width": width},
        "resample": next(number for number, name in RESAMPLE.items() if name == p.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
