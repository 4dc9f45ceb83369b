"""Directories of Hugging Face Transformers: ViT, DeiT, ViTMAE's encoder, CLIP, SigLIP, DINOv2 (also with registers) and
DINOv3.

Of a model with a text tower the vision tower is read. CLIP's projection becomes the head, without class names: outputs
are then image embeddings, as in timm. A model without a classifier or a projection gives what Transformers calls
pooler_output. A DeiT without the teacher's head reads nothing from its distillation token, which makes it a register
token of ours. Shapes come from the weights, and must be those of config.json, which says the rest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.formats import huggingface_families as hf
from tinyvit.checkpoints.formats.common import (
    count_blocks,
    count_classes,
    find_grid,
    mlp_ratio,
    pack_qkv,
    refusing,
    renamed,
)
from tinyvit.checkpoints.formats.huggingface_names import UNUSED, our_name
from tinyvit.checkpoints.formats.huggingface_preprocessing import read_preprocessing
from tinyvit.checkpoints.native_file import SIMILARITY
from tinyvit.checkpoints.readers.weight_files import CONFIG, WeightFiles
from tinyvit.files.fields import boolean, checked, either, integer, list_of, number, object_of, one_of, optional, text
from tinyvit.models.config import ViTConfig

TELLING = (  # how a name ends that only these models have
    "embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight", "embeddings.position_embeddings", "layer_scale1.lambda1",
)  # fmt: skip
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}  # fmt: skip
SILU = ("silu", "swish")  # within gated MLPs alone, which have no other in ours
HEADS = ("ForImageClassification", "WithTeacher", "WithProjection", "CLIPModel")  # ends of names of models with a head


PIXELS = either(integer(1, 65536), list_of(integer(1, 65536), 2, 2))
SETTINGS = {  # of config.json, or of its vision_config
    "architectures": optional(list_of(text, 0, 100)),
    "id2label": optional(object_of(lambda name: name)),
    "hidden_act": one_of(*ACTIVATIONS, *SILU),
    "pooler_act": text,
    "image_size": PIXELS,
    "patch_size": PIXELS,
    "num_channels": integer(1, 1024),
    "hidden_size": integer(1, 65536),
    "num_hidden_layers": integer(1, 10_000),
    "num_attention_heads": integer(1, 65536),
    "intermediate_size": integer(1, 1 << 20),
    "num_register_tokens": integer(0, 65536),
    "qkv_bias": boolean,
    **dict.fromkeys(("query_bias", "key_bias", "vision_use_head"), boolean),
    "rope_theta": number(100, 100),
    "layer_norm_eps": number(0, 1),
    "hidden_dropout_prob": number(0, 1),
    "attention_probs_dropout_prob": number(0, 1),
}


def recognises(names: Collection[str]) -> bool:
    return any(name.endswith(TELLING) for name in names)


def read(files: WeightFiles) -> Checkpoint:
    """The model that config.json and the weights describe. Raises CheckpointError."""
    if not files.config:
        raise CheckpointError(f"{files.path}: Transformers' weights need their config.json beside them")
    scale, bias = (files.arrays.get(f"logit_{name}") for name in ("scale", "bias"))
    for name in [name for name in files.arrays if UNUSED.match(name)]:
        del files.arrays[name]
    projects = any(name.endswith("visual_projection.weight") for name in files.arrays)
    state = renamed(files, our_name)
    with refusing(f"{files.path}: its {CONFIG} describes no model of ours"):
        model_type = checked(files.config, {"model_type": one_of(*hf.FAMILIES)}, required=["model_type"])["model_type"]
        vision = files.config.get("vision_config")
        given = checked({**files.config, **(vision if isinstance(vision, dict) else {})}, SETTINGS)
        similarity, family = read_similarity(scale, bias), hf.FAMILIES[model_type]
        headed = next((name for name in given.get("architectures") or () if name.endswith(HEADS)), "")
        wanted = given.get("id2label") != {} and files.overrides.get("num_classes") != 0
        if headed and wanted and "head.weight" not in state:
            raise ValueError(f"the head of a {headed} is missing")
        pooling = arrange(state, given, family, headed, projects)
        config = read_config(state, given, family, pooling)
        check_shape(config, given)
    names = given.get("id2label")
    if projects:
        state["head.bias"], names = np.zeros(config.num_classes, np.float32), None
    return Checkpoint(
        path=files.path,
        config=config,
        state=state,
        class_names=class_names(files.path, names or {}, config.num_classes),
        preprocessing=read_preprocessing(files, config, family.usual),
        similarity=similarity,
    )


def check_shape(config: ViTConfig, given: Mapping[str, Any]) -> None:
    """Raises ValueError where config.json says another shape than the weights, of which some may then be missing."""
    for name, ours in (hf.SHAPE | {"num_register_tokens": "reg_tokens"}).items():
        value = getattr(config, ours)
        said = given.get(name, value)
        if (said, said) != value and said != value:
            raise ValueError(f"{name} is {said}, and {value} by the weights")


def read_similarity(scale: np.ndarray | None, bias: np.ndarray | None) -> dict[str, float]:
    """How images and texts are compared, from logit_scale, the logarithm of a factor, and logit_bias.

    Raises OverflowError or ValueError for what is no single number in range.
    """
    found = {} if scale is None else {"scale": math.exp(scale.item())}
    found |= {} if bias is None else {"bias": float(bias.item())}
    return checked(found, SIMILARITY)


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


def arrange(
    state: dict[str, np.ndarray], given: Mapping[str, Any], family: hf.Family, headed: str, projects: bool
) -> str:
    """Give the renamed weights our shapes, in place; the pooling of the model.

    Args:
        state: the weights by our names.
        given: what config.json says.
        family: of the model.
        headed: the name of the model's class if it has a head.
        projects: whether that is CLIP's projection.

    Raises KeyError or ValueError.
    """
    if family is hf.DINOV3 and not given.get("key_bias", False):
        for name in [name for name in state if name.endswith(".attn.query.bias")]:
            state.setdefault(name.replace(".query.", ".key."), np.zeros_like(state[name]))
    pack_qkv(state)
    for name in [name for name in state if ".mlp.fc1_g." in name]:
        linear = name.replace("fc1_g", "fc1")
        state[linear] = np.concatenate([state.pop(name), state[linear]])
    for kind in ("weight", "bias"):
        if (packed := state.pop(f"attn_pool.in_proj.{kind}", None)) is not None:
            third = len(packed) // 3
            state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = packed[:third], packed[third:]
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in state:
        positions = state["pos_embed"].reshape(1, *state["pos_embed"].shape[-2:])
        if "reg_token" in state:  # they stand behind the class token and have no positions
            state["cls_token"] = state["cls_token"] + positions[:, :1]
            positions = positions[:, 1:]
        state["pos_embed"] = positions
    if "head.weight" not in state or projects:
        if family is hf.SIGLIP and given.get("vision_use_head", True) and "attn_pool.latent" not in state:
            raise ValueError("its attention pooling (vision_use_head) is missing")
        return "map" if "attn_pool.latent" in state else "token" if "cls_token" in state else "avg"
    for name in [name for name in state if name.startswith(("attn_pool.", "pre_logits."))]:
        del state[name]  # a classifier does not read them; Transformers, too, passes over a pooler then
    if "dist_token" in state and "head_dist.weight" not in state and not headed.endswith("WithTeacher"):
        state["reg_token"] = state.pop("dist_token")
    if family is hf.CLIP:  # its classifier reads tokens that are not normalised
        del state["norm.weight"], state["norm.bias"]
    elif family in hf.BOTH_DINOV2:  # theirs reads the class token and the mean
        token, mean = np.split(state["head.weight"], 2, axis=1)
        if token.any() and mean.any():
            raise ValueError("its classifier reads the class token and the mean of the patches side by side")
        state["head.weight"] = mean if mean.any() else token
        return "avg" if mean.any() else "token"
    return "token" if family in (hf.VIT, hf.DEIT) else "avg"


def read_config(state: Mapping[str, np.ndarray], given: dict[str, Any], family: hf.Family, pooling: str) -> ViTConfig:
    """Our config. Raises KeyError, IndexError, TypeError or ValueError."""
    embed_dim, in_chans, *patch = state["patch_embed.proj.weight"].shape
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    swiglu, rope = len(state["blocks.0.mlp.fc1.weight"]) == 2 * hidden, family is hf.DINOV3
    act = given.get("hidden_act", family.act)
    if (act in SILU) != swiglu and not (swiglu and not rope):  # DINOv2's gated MLPs pass over it
        raise ValueError(f"hidden_act is {act!r} {'in' if swiglu else 'outside'} gated MLPs")
    pooler = state.get("pre_logits.fc.weight")
    if pooler is not None and given.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"pooler_act is {given['pooler_act']!r}, expected tanh")
    registers, distilled = state["reg_token"].shape[1] if "reg_token" in state else 0, "dist_token" in state
    class_token, no_embed_class = family is not hf.SIGLIP, family is hf.WITH_REGISTERS and registers > 0
    said = given.get("image_size", 224)
    size = (said, said) if isinstance(said, int) else said
    if not rope:
        patches = state["pos_embed"].shape[1] - (0 if no_embed_class else class_token + distilled + registers)
        size = find_grid(patches, 0, (patch[0], patch[1]), known=[size])[0]["image_size"]
    dropout = given.get("hidden_dropout_prob", 0.0)
    return ViTConfig(
        image_size=size,
        patch_size=tuple(patch),
        trim_image=any(side % length for side, length in zip(size, patch, strict=True)),
        in_chans=in_chans,
        num_classes=count_classes(state, "head.weight"),
        embed_dim=embed_dim,
        depth=count_blocks(state),
        num_heads=given.get("num_attention_heads", family.heads),
        mlp_ratio=mlp_ratio(hidden, embed_dim),
        swiglu=swiglu,
        qkv_bias=given.get("query_bias" if rope else "qkv_bias", True),
        class_token=class_token,
        reg_tokens=registers,
        distilled=distilled,
        no_embed_class=no_embed_class,
        pos_embed="none" if rope else "learn",
        rope="dinov3" if rope else None,
        global_pool=pooling,
        fc_norm=False if pooling == "avg" else None,
        act="gelu" if swiglu else ACTIVATIONS[act],
        norm_eps=given.get("layer_norm_eps", family.eps),
        init_values=1.0 if family in (*hf.BOTH_DINOV2, hf.DINOV3) else None,
        pre_norm=family is hf.CLIP,
        final_norm=not (family is hf.CLIP and pooling == "avg"),
        representation_size=None if pooler is None else len(pooler),
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=given.get("attention_probs_dropout_prob", 0.0),
    )
