"""Directories of Hugging Face Transformers beside ViT and DeiT: CLIP, SigLIP, DINOv2 (also with registers) and DINOv3.

Of a model with a text tower the vision tower is read. CLIP's projection becomes the head, without class names: outputs
are then image embeddings, as in timm. A model without a classifier or a projection gives what Transformers calls
pooler_output. Shapes come from the weights; config.json says the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.formats.common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    count_classes,
    mlp_ratio,
    pack_qkv,
    renamed,
    square_grid,
)
from tinyvit.checkpoints.formats.huggingface import FIELDS, class_names, names_by_number, read_preprocessing
from tinyvit.checkpoints.readers.common import reason
from tinyvit.checkpoints.readers.weight_files import CONFIG, WeightFiles
from tinyvit.files.fields import checked, integer, number, one_of, optional
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing

TELLING = ("layer_scale1.lambda1", "embeddings.patch_embedding.weight", "embeddings.patch_embeddings.weight")
UNUSED = re.compile(
    r"text_model\.|text_projection\.|logit_(scale|bias)$|(.*\.)?(embeddings\.)?(mask_token|position_ids)$"
)
FRONT = re.compile(r"^(model\.)?(vision_model|dinov2|dinov2_with_registers|dinov3_vit)?\.?(?=[a-z])")
NAMES = {  # theirs and ours
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "head.probe": "attn_pool.latent",
    "head.attention.in_proj_weight": "attn_pool.in_proj.weight",
    "head.attention.in_proj_bias": "attn_pool.in_proj.bias",
}
MODULES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",
    "layernorm": "norm",
    "post_layernorm": "norm",
    "norm": "norm",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp.fc1": "attn_pool.mlp.fc1",
    "head.mlp.fc2": "attn_pool.mlp.fc2",
    "visual_projection": "head",
    "classifier": "head",
}
BLOCK = {  # the same within a block
    **{name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    **{f"attention.attention.{part}": f"attn.{part}" for part in ("query", "key", "value")},
    **{f"{attention}.{part[0]}_proj": f"attn.{part}" for part in ("query", "key", "value")
       for attention in ("attention", "self_attn", "attention.attention")},
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.gate_proj": "mlp.fc1_g",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}  # fmt: skip


class Family(NamedTuple):
    """What config.json leaves out where it is usual: heads, activation, epsilon, and how images are normalised."""

    heads: int
    act: str
    eps: float
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


CLIP = Family(12, "quick_gelu", 1e-5, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = Family(12, "gelu_tanh", 1e-6, (0.5,) * 3, (0.5,) * 3)
FAMILIES = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "dinov2": Family(12, "gelu", 1e-6),
    "dinov2_with_registers": Family(12, "gelu", 1e-6),
    "dinov3_vit": Family(6, "gelu", 1e-5),
}
ACTIVATIONS = {
    "gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "silu": "gelu", "swish": "gelu",  # within gated MLPs alone, which take no other
}  # fmt: skip
SETTINGS = {  # of config.json, or of its vision_config
    "num_attention_heads": FIELDS["num_attention_heads"],
    "hidden_act": one_of(*ACTIVATIONS),
    "layer_norm_eps": number(0, 1),
    "image_size": FIELDS["image_size"],
    "id2label": optional(names_by_number),
    "rope_theta": number(100, 100),
    "num_hidden_layers": integer(1, 10_000),
}


def recognises(names: Collection[str]) -> bool:
    return any(name.endswith(TELLING) for name in names)


def read(files: WeightFiles) -> Checkpoint:
    """The model that config.json and the weights describe. Raises CheckpointError."""
    if not files.config:
        raise CheckpointError(f"{files.path}: Transformers' weights need their config.json beside them")
    for name in [name for name in files.arrays if UNUSED.match(name)]:
        del files.arrays[name]
    state = renamed(files, our_name)
    try:
        model_type = checked(files.config, {"model_type": one_of(*FAMILIES)}, required=["model_type"])["model_type"]
        vision = files.config.get("vision_config")
        given = checked({**files.config, **(vision if isinstance(vision, dict) else {})}, SETTINGS)
        arrange(state)
        config = read_config(state, given, FAMILIES[model_type])
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{files.path}: its {CONFIG} describes no model of ours: {reason(error)}") from None
    names = given.get("id2label")
    if config.num_classes and "head.bias" not in state:  # CLIP's projection
        state["head.bias"], names = np.zeros(config.num_classes, np.float32), None
    preprocessing = read_preprocessing(files, model_type, config)
    if not files.preprocessor:
        family = FAMILIES[model_type]
        preprocessing = Preprocessing(family.mean, family.std, crop_pct=0.875 if "dino" in model_type else 1.0)
    return Checkpoint(
        path=files.path,
        config=config,
        state=state,
        class_names=class_names(files.path, names or {}, config.num_classes),
        preprocessing=preprocessing,
    )


def our_name(name: str) -> str:
    """Our name of a weight, or the name as it is when we have none."""
    plain = FRONT.sub("", name)
    if plain in NAMES:
        return NAMES[plain]
    module, _, kind = plain.rpartition(".")
    if block := re.fullmatch(r"(?:encoder\.)?layers?\.(\d+)\.(.+)", module):
        kind = "gamma" if kind == "lambda1" else kind
        return f"blocks.{block[1]}.{BLOCK[block[2]]}.{kind}" if block[2] in BLOCK else name
    return f"{MODULES[module]}.{kind}" if module in MODULES else name


def arrange(state: dict[str, np.ndarray]) -> None:
    """Give the renamed weights our shapes, in place. Raises KeyError or ValueError."""
    for name in [name for name in state if name.endswith(".attn.query.bias")]:  # DINOv3's keys have none
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
    if "head.weight" in state and "head.bias" in state:  # a classifier
        width = len(state["norm.weight"])
        if state["head.weight"].shape[1] != width:
            raise ValueError("its classifier reads the class token and the mean of the patches side by side")
        for name in [name for name in state if name.startswith("attn_pool.")]:
            del state[name]
        if "norm_pre.weight" in state:  # CLIP's classifier reads tokens that are not normalised
            del state["norm.weight"], state["norm.bias"]


def read_config(state: Mapping[str, np.ndarray], given: dict[str, Any], family: Family) -> ViTConfig:
    """Our config. Raises KeyError, IndexError, TypeError or ValueError."""
    embed_dim, in_chans, *patch = state["patch_embed.proj.weight"].shape
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    clip, classifier = "norm_pre.weight" in state, "head.weight" in state and "head.bias" in state
    token = "cls_token" in state
    pooling = "map" if "attn_pool.latent" in state else "avg" if classifier or not token else "token"
    size: Any = given.get("image_size", 224)
    no_embed_class = "reg_token" in state
    if "pos_embed" in state:
        count = state["pos_embed"].shape[1] - (token and not no_embed_class)
        rows, columns = square_grid(count)
        size = (rows * patch[0], columns * patch[1])
    return ViTConfig(
        image_size=size,
        patch_size=tuple(patch),
        in_chans=in_chans,
        num_classes=count_classes(state, "head.weight"),
        embed_dim=embed_dim,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads=given.get("num_attention_heads", family.heads),
        mlp_ratio=mlp_ratio(hidden, embed_dim),
        swiglu=len(state["blocks.0.mlp.fc1.weight"]) == 2 * hidden,
        qkv_bias=any(".attn.qkv.bias" in name for name in state),
        class_token=token,
        reg_tokens=state["reg_token"].shape[1] if "reg_token" in state else 0,
        no_embed_class=no_embed_class and "pos_embed" in state,
        pos_embed="learn" if "pos_embed" in state else "none",
        rope=None if "pos_embed" in state else "dinov3",
        global_pool=pooling,
        fc_norm=False if pooling == "avg" else None,
        act=ACTIVATIONS[given["hidden_act"]] if "hidden_act" in given else family.act,
        norm_eps=given.get("layer_norm_eps", family.eps),
        init_values=1.0 if any(name.endswith(".gamma") for name in state) else None,
        pre_norm=clip,
        final_norm="norm.weight" in state,
    )
