"""Writing a directory that Hugging Face Transformers opens: of its models, the one that has room for ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.formats import huggingface_families as hf
from tinyvit.checkpoints.formats import huggingface_names as names
from tinyvit.checkpoints.formats.common import split_qkv, write_directory
from tinyvit.checkpoints.formats.huggingface_preprocessing import write_preprocessing
from tinyvit.checkpoints.readers.weight_files import CONFIG, PREPROCESSOR
from tinyvit.models.config import ViTConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
MOST_MLP_RATIO = 64


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json into the new directory `path`.

    Raises CheckpointError, naming it, for a part that Transformers' models do not have.
    """
    config, family = checkpoint.config, choose(checkpoint.config)
    if lacking := without_room(checkpoint, family):
        raise CheckpointError(f"{path}: Transformers' {family.model_type} has no room for {lacking}")
    state = arrange(dict(checkpoint.state), config, family)
    table = family.names
    if family in hf.BOTH_DINOV2 and config.swiglu:
        table = names.DINOV2_GATED
    if config.distilled:
        table = names.TEACHER
    if family is hf.CLIP and config.global_pool == "token":
        table = names.CLIP_PROJECTION
    tower = family.tower if config.num_classes or family in (hf.CLIP, hf.SIGLIP) else ""
    weights = {names.their_name(name, table, tower): array for name, array in state.items()}
    files = {
        CONFIG: json.dumps(write_config(checkpoint, family, state), indent=2),
        PREPROCESSOR: json.dumps(write_preprocessing(checkpoint), indent=2),
    }
    write_directory(path, weights, files)


def choose(config: ViTConfig) -> hf.Family:
    """The family that models of this kind belong to, whether or not it has room for all that this one is."""
    if config.rope:
        return hf.DINOV3
    if config.pre_norm:
        return hf.CLIP
    if not config.class_token or config.global_pool == "map":
        return hf.SIGLIP
    if not config.distilled and (config.init_values is not None or config.swiglu or config.reg_tokens > 1):
        return hf.WITH_REGISTERS if config.reg_tokens else hf.DINOV2
    return hf.DEIT if config.distilled or config.reg_tokens else hf.VIT


def pooling(config: ViTConfig) -> str:
    """The model's global_pool, or "avg, then the norm" with a norm behind the mean."""
    return "avg, then the norm" if config.norm_after_pool and config.final_norm else config.global_pool


def without_room(checkpoint: Checkpoint, family: hf.Family) -> str | None:
    """What the model has and theirs do not."""
    config = checkpoint.config
    for name, values in family.room.items():
        if getattr(config, name) not in values:
            return f"{name} {getattr(config, name)!r}"
    if (pooling(config), config.num_classes > 0) not in family.classes:
        return f"{'a' if config.num_classes else 'no'} head behind global_pool {pooling(config)!r}"
    if family is hf.DEIT and config.reg_tokens + config.distilled > 1:
        return f"reg_tokens {config.reg_tokens}"
    if config.representation_size and config.num_classes:
        return f"representation_size {config.representation_size} (pre_logits) before a head"
    if family in (hf.VIT, hf.DEIT, hf.DINOV3):
        return None
    if config.image_size[0] != config.image_size[1] or config.patch_size[0] != config.patch_size[1]:
        return f"images of {config.image_size} with patches of {config.patch_size}"
    if family in hf.BOTH_DINOV2 and mlp_ratio(config) is None:
        return f"MLPs of the width {config.mlp_dim}"
    if family is hf.CLIP:
        if config.global_pool == "token" and config.num_classes and np.any(checkpoint.state["head.bias"]):
            return "biases of its projection (head.bias)"
        if config.final_norm != (config.global_pool == "token"):
            return f"final_norm {config.final_norm} with global_pool {config.global_pool!r}"
    return None


def mlp_ratio(config: ViTConfig) -> int | None:
    """The whole number from which DINOv2 gets the width of its MLPs, None if there is none."""

    def width(ratio: int) -> int:
        hidden = config.embed_dim * ratio
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if config.swiglu else hidden

    return next((ratio for ratio in range(1, MOST_MLP_RATIO + 1) if width(ratio) == config.mlp_dim), None)


def arrange(state: dict[str, np.ndarray], config: ViTConfig, family: hf.Family) -> dict[str, np.ndarray]:
    """The weights in Transformers' shapes, under our names; the same dictionary."""
    split_qkv(state)
    like, dim = state["patch_embed.proj.weight"], config.embed_dim

    def constant(value: float, *shape: int) -> np.ndarray:
        return np.full(shape, value, like.dtype)

    if config.no_embed_class:  # the same as position embeddings of zero for the tokens in front
        zeros = constant(0, 1, config.num_prefix_tokens, dim)
        state["pos_embed"] = np.concatenate([zeros, state["pos_embed"]], axis=1)
    if family is hf.DEIT and "reg_token" in state:
        state["dist_token"] = state.pop("reg_token")
    if family in (*hf.BOTH_DINOV2, hf.DINOV3):
        state["mask_token"] = constant(0, *(1, 1, dim)[family is not hf.DINOV3 :])
        if config.init_values is None:
            state |= {f"blocks.{i}.ls{j}.gamma": constant(1, dim) for i in range(config.depth) for j in (1, 2)}
    if family is hf.WITH_REGISTERS:
        first, registers, patches = np.split(state["pos_embed"], [1, 1 + config.reg_tokens], axis=1)
        state["reg_token"] = state["reg_token"] + registers
        state["pos_embed"] = np.concatenate([first, patches], axis=1)
    if family in hf.BOTH_DINOV2 and config.num_classes:  # theirs also reads the other of token and mean
        halves = [state["head.weight"], constant(0, config.num_classes, dim)]
        state["head.weight"] = np.concatenate(halves[:: 1 if config.global_pool == "token" else -1], axis=1)
    if family is hf.DINOV3:
        state.setdefault("reg_token", constant(0, 1, 0, dim))
        keys = [name for name in state if name.endswith(".attn.key.bias")]
        for name in keys if not any(state[name].any() for name in keys) else ():
            del state[name]
        for name in [name for name in state if ".mlp.fc1." in name] if config.swiglu else []:
            state[name.replace("fc1", "fc1_g")], state[name] = np.split(state[name], 2)
    if family in (hf.CLIP, hf.SIGLIP):
        state["pos_embed"] = state["pos_embed"][0]
        if "cls_token" in state:
            state["cls_token"] = state["cls_token"].reshape(dim)
        for kind in ("weight", "bias") if config.global_pool == "map" else ():
            packed = [state.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
            state[f"attn_pool.in_proj.{kind}"] = np.concatenate(packed)
    if family is hf.CLIP and config.global_pool == "token":
        state.pop("head.bias", None)  # zeros
    elif family is hf.CLIP:  # theirs has a norm behind the blocks that its classifier does not read
        state["norm.weight"], state["norm.bias"] = constant(1, dim), constant(0, dim)
    return state


def write_config(checkpoint: Checkpoint, family: hf.Family, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """config.json for the arranged weights."""
    config, class_names = checkpoint.config, checkpoint.class_names

    def plain(value: Any) -> Any:
        return value[0] if isinstance(value, tuple) and value[0] == value[1] else value

    content: dict[str, Any] = {
        "model_type": family.model_type,
        **{theirs: plain(getattr(config, ours)) for theirs, ours in hf.SHAPE.items()},
        "num_attention_heads": config.num_heads,
        "hidden_act": "silu" if config.swiglu else ACTIVATIONS[config.act],
        "layer_norm_eps": config.norm_eps,
    }
    if family in (hf.VIT, hf.DEIT, *hf.BOTH_DINOV2):
        content["qkv_bias"] = config.qkv_bias
        content["hidden_dropout_prob"] = config.proj_drop_rate
        content["attention_probs_dropout_prob"] = config.attn_drop_rate
    if family in hf.BOTH_DINOV2:
        content |= {"mlp_ratio": mlp_ratio(config), "use_swiglu_ffn": config.swiglu}
    if family in (hf.WITH_REGISTERS, hf.DINOV3):
        content["num_register_tokens"] = config.reg_tokens
    if family is hf.DINOV3:
        content |= {"use_gated_mlp": config.swiglu, "query_bias": config.qkv_bias, "value_bias": config.qkv_bias}
        content["key_bias"] = "blocks.0.attn.key.bias" in state
    if family is hf.SIGLIP:
        content["vision_use_head"] = config.global_pool == "map"
    if config.representation_size:
        content["pooler_output_size"] = config.representation_size
    name = family.classes[pooling(config), config.num_classes > 0]
    if name == "CLIPVisionModelWithProjection":
        content["projection_dim"] = config.num_classes
    elif family in (hf.CLIP, hf.SIGLIP) and config.num_classes:
        content = {"model_type": family.model_type.partition("_")[0], "vision_config": content}
    if class_names and "Classification" in name:
        content["id2label"] = {str(i): name for i, name in enumerate(class_names)}
        content["label2id"] = {name: i for i, name in enumerate(class_names)}
    return {"architectures": [name + ("WithTeacher" if config.distilled and config.num_classes else "")], **content}
