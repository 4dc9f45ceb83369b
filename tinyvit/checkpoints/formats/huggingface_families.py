"""Directories of Hugging Face Transformers beside ViT and DeiT: CLIP, SigLIP, DINOv2 (also with registers) and DINOv3.

Of a model with a text tower the vision tower is read. CLIP's projection becomes the head, without class names: outputs
are then image embeddings, as in timm. A model without a classifier or a projection gives what Transformers calls
pooler_output. Shapes come from the weights; config.json says the rest.
"""

from __future__ import annotations

import math
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
from tinyvit.checkpoints.formats.huggingface import ACTIVATIONS, FIELDS, class_names, names_by_number
from tinyvit.checkpoints.formats.huggingface_names import UNUSED, our_name
from tinyvit.checkpoints.formats.huggingface_preprocessing import read_preprocessing
from tinyvit.checkpoints.native_file import SIMILARITY
from tinyvit.checkpoints.readers.common import reason
from tinyvit.checkpoints.readers.weight_files import CONFIG, WeightFiles
from tinyvit.files.fields import boolean, checked, integer, number, one_of, optional
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing

TELLING = ("layer_scale1.lambda1", "embeddings.patch_embedding.weight", "embeddings.patch_embeddings.weight")


class Family(NamedTuple):
    """What the models of a family have in common, and what config.json leaves out where it is usual."""

    heads: int
    act: str
    eps: float
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    class_token: bool = True
    registers: int | None = None
    layer_scale: bool = False
    rope: str | None = None


CLIP = Family(12, "quick_gelu", 1e-5, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = Family(12, "gelu_pytorch_tanh", 1e-6, (0.5,) * 3, (0.5,) * 3, class_token=False)
FAMILIES = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "dinov2": Family(12, "gelu", 1e-6, layer_scale=True),
    "dinov2_with_registers": Family(12, "gelu", 1e-6, layer_scale=True, registers=4),
    "dinov3_vit": Family(6, "gelu", 1e-5, layer_scale=True, registers=0, rope="dinov3"),
}
SILU = ("silu", "swish")  # within gated MLPs alone, which have no other in ours
SETTINGS = {  # of config.json, or of its vision_config
    "num_attention_heads": FIELDS["num_attention_heads"],
    "hidden_act": one_of(*ACTIVATIONS, *SILU),
    "layer_norm_eps": number(0, 1),
    **{name: FIELDS[name] for name in ("image_size", "patch_size", "num_channels", "hidden_size", "intermediate_size")},
    "id2label": optional(names_by_number),
    "rope_theta": number(100, 100),
    "num_hidden_layers": FIELDS["num_hidden_layers"],
    "num_register_tokens": integer(0, 65536),
    "key_bias": boolean,
    "architectures": FIELDS["architectures"],
}
HEADS = ("ForImageClassification", "WithProjection", "CLIPModel")  # how the names of models with a head end


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
    try:
        model_type = checked(files.config, {"model_type": one_of(*FAMILIES)}, required=["model_type"])["model_type"]
        vision = files.config.get("vision_config")
        given = checked({**files.config, **(vision if isinstance(vision, dict) else {})}, SETTINGS)
        similarity = read_similarity(scale, bias)
        family = FAMILIES[model_type]
        without_key_bias = family.rope is not None and not given.get("key_bias", False)
        pooling = arrange(state, without_key_bias, classifies="head.weight" in state and not projects)
        config = read_config(state, given, family, pooling)
        check_shape(config, given)
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{files.path}: its {CONFIG} describes no model of ours: {reason(error)}") from None
    names = given.get("id2label")
    if projects:
        state["head.bias"], names = np.zeros(config.num_classes, np.float32), None
    usual = Preprocessing(family.mean, family.std, crop_pct=0.875 if "dino" in model_type else 1.0)
    return Checkpoint(
        path=files.path,
        config=config,
        state=state,
        class_names=class_names(files.path, names or {}, config.num_classes),
        preprocessing=read_preprocessing(files, config, usual),
        similarity=similarity,
    )


def check_shape(config: ViTConfig, given: Mapping[str, Any]) -> None:
    """Raises ValueError where config.json says another shape than the weights, of which some may then be missing."""
    found = {
        "num_hidden_layers": config.depth,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_channels": config.in_chans,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
    }
    for name, value in found.items():
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


def arrange(state: dict[str, np.ndarray], without_key_bias: bool, classifies: bool) -> str:
    """Give the renamed weights our shapes, in place; the pooling of the model. Raises KeyError or ValueError."""
    for name in [name for name in state if name.endswith(".attn.query.bias")] if without_key_bias else ():
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
    if not classifies:
        return "map" if "attn_pool.latent" in state else "token" if "cls_token" in state else "avg"
    for name in [name for name in state if name.startswith("attn_pool.")]:
        del state[name]
    if "norm_pre.weight" in state:  # CLIP's classifier reads tokens that are not normalised
        del state["norm.weight"], state["norm.bias"]
    elif state["head.weight"].shape[1] != len(state["norm.weight"]):  # DINOv2's: the class token and the mean
        token, mean = np.split(state["head.weight"], 2, axis=1)
        if token.any() and mean.any():
            raise ValueError("its classifier reads the class token and the mean of the patches side by side")
        state["head.weight"] = mean if mean.any() else token
        return "avg" if mean.any() else "token"
    return "avg"


def read_config(state: Mapping[str, np.ndarray], given: dict[str, Any], family: Family, pooling: str) -> ViTConfig:
    """Our config. Raises KeyError, IndexError, TypeError or ValueError."""
    embed_dim, in_chans, *patch = state["patch_embed.proj.weight"].shape
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    swiglu = len(state["blocks.0.mlp.fc1.weight"]) == 2 * hidden
    act = given.get("hidden_act", family.act)
    if (act in SILU) != swiglu and not (swiglu and not family.rope):  # DINOv2's gated MLPs pass over it
        raise ValueError(f"hidden_act is {act!r} {'in' if swiglu else 'outside'} gated MLPs")
    named = next((name for name in given.get("architectures") or () if name.endswith(HEADS)), None)
    if named and "head.weight" not in state and given.get("id2label") != {}:
        raise ValueError(f"a {named} has a head, and there is none")
    registers = 0 if family.registers is None else given.get("num_register_tokens", family.registers)
    said = given.get("image_size", 224)
    size = (said, said) if isinstance(said, int) else said
    if not family.rope:
        grid = square_grid(state["pos_embed"].shape[1] - (family.class_token and not registers))
        if (size[0] // patch[0], size[1] // patch[1]) != grid:
            size = (grid[0] * patch[0], grid[1] * patch[1])
    return ViTConfig(
        image_size=size,
        patch_size=tuple(patch),
        trim_image=any(side % length for side, length in zip(size, patch, strict=True)),
        in_chans=in_chans,
        num_classes=count_classes(state, "head.weight"),
        embed_dim=embed_dim,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads=given.get("num_attention_heads", family.heads),
        mlp_ratio=mlp_ratio(hidden, embed_dim),
        swiglu=swiglu,
        qkv_bias=any(".attn.qkv.bias" in name for name in state),
        class_token=family.class_token,
        reg_tokens=registers,
        no_embed_class=registers > 0 and not family.rope,
        pos_embed="none" if family.rope else "learn",
        rope=family.rope,
        global_pool=pooling,
        fc_norm=False if pooling == "avg" else None,
        act="gelu" if swiglu else ACTIVATIONS[act],
        norm_eps=given.get("layer_norm_eps", family.eps),
        init_values=1.0 if family.layer_scale else None,
        pre_norm=family is CLIP,
        final_norm=not (family is CLIP and pooling == "avg"),
    )
