"""timm's ViT, DeiT and hybrids: state dicts in .safetensors and .pth files, and hub directories. Their names are ours.

A state dict alone says nearly everything by its names and shapes; what it cannot say is taken from config.json in a
hub directory, from a model's name in the file name, or from what timm does by default.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import PREPROCESSING, Checkpoint, CheckpointError, checked_preprocessing
from tinyvit.checkpoints.formats import timm_names
from tinyvit.checkpoints.formats.common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Size,
    count_blocks,
    count_classes,
    find_grid,
    mlp_ratio,
    names_of_classes,
    pack_qkv,
    refusing,
    renamed,
    resnet_layers,
    stem,
    without_null,
)
from tinyvit.checkpoints.readers.weight_files import CONFIG, WeightFiles
from tinyvit.files.fields import boolean, checked, either, integer, list_of, number, object_of, one_of, text
from tinyvit.models import registry, resnet
from tinyvit.models.config import ViTConfig

PATCHES = "patch_embed.proj.weight"
PROJECTIONS = {"q": "query", "k": "key", "v": "value"}
HEAD_WIDTH = 64  # of an attention head in nearly all published models
LAYER_SCALE = 1e-5  # its usual start value
NORM_EPS, LARGE_NORM_EPS = 1e-6, 1e-5
UNSUPPORTED = {  # parts of timm's other models, and what they are
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "attn.gate.": "gated attention",
    "attn.lambda_": "differential attention",
    "attns.": "several attentions side by side",
    "in_proj.": "attention and MLP side by side",
    "decoder_": "a decoder",
}
RESNET = re.compile(  # the parts of the ResNet that ours is, with stages or without
    r"patch_embed\.backbone\.((stem\.)?(conv|norm)|stages\.\d+\.blocks\.\d+\.(downsample\.(conv|norm)|(conv|norm)[123]))\.\w+"
)
UNUSED = ("mask_token",)  # of pre-training by masked images


PIXELS = integer(1, 65536)
FIELDS = {  # of config.json
    "architecture": text,
    "num_heads": integer(1, 65536),
    "global_pool": text,
    "act_layer": one_of("gelu", "gelu_tanh", "quick_gelu", "silu"),
    "norm_eps": number(0, 1),
    "img_size": either(PIXELS, list_of(PIXELS, 2, 2)),
    "input_size": list_of(PIXELS, 3, 3),
    "label_names": list_of(text, 0, 1_000_000),
    "label_descriptions": object_of(text),
    "fc_norm": either(boolean, text),
    "num_classes": integer(0, 1 << 31),
    "depth": integer(1, 65536),
    "final_norm": boolean,
    "pool_include_prefix": boolean,
    **PREPROCESSING,
}


def recognises(names: Collection[str]) -> bool:
    return PATCHES in names or any(re.match(r"blocks\.\d+\.", name) for name in names)


def read(files: WeightFiles) -> Checkpoint:
    """The model of a state dict. Raises CheckpointError."""
    for unused in [name for name in files.arrays if name in UNUSED]:
        del files.arrays[unused]
    state = renamed(files, our_name)
    with refusing(f"{files.path}: its {CONFIG} cannot be followed"):
        card = read_card(files.config)
    name = card.get("architecture", files.path.name)[:255]
    said = timm_names.facts(name)
    if part := unsupported_part(state) or said.get("unsupported"):
        raise CheckpointError(f"{files.path}: the model has {part}, which is not supported")
    with refusing(f"{files.path}: its weights describe no model of ours"):
        pack(state)
        config = read_config(state, {**said, **card}, name, files)
        check_complete(config, card, files)
    with refusing(f"{files.path}: its {CONFIG} cannot be followed"):
        mean, std = usual_statistics(files, name, config, "mean" in card)
        usual = {"mean": mean, "std": std, "crop_pct": 0.9 if max(config.image_size) < 384 else 1.0}
        preprocessing = checked_preprocessing({**usual, **card}, config.in_chans)
    return Checkpoint(
        path=files.path,
        config=config,
        state=state,
        class_names=names_of_classes(labels(card), config.num_classes),
        preprocessing=preprocessing,
    )


def usual_statistics(files: WeightFiles, name: str, config: ViTConfig, said: bool) -> tuple[tuple[float, ...], ...]:
    """Mean and std by the model's name; 0.5 otherwise, with a warning unless they are `said` elsewhere."""
    imagenet = (IMAGENET_MEAN, IMAGENET_STD) if config.distilled else None
    known = timm_names.statistics(name) or imagenet if config.in_chans == 3 else None
    if known is None and not said:
        warnings.warn(
            f"{files.path}: nothing says how images are normalised, mean and std 0.5 are assumed: name the file as its "
            "model, or write a config.json with mean and std beside it",
            stacklevel=2,
        )
    return known or ((0.5,) * config.in_chans,) * 2


def our_name(name: str) -> str:
    """Our name. The older ones are those of the authors of DeiT III (gamma_1) and DINOv2 (w12)."""
    name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
    name = re.sub(r"\.attn\.([qkv])_proj\.", lambda found: f".attn.{PROJECTIONS[found[1]]}.", name)
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def pack(state: dict[str, np.ndarray]) -> None:
    """Put together what EVA's models keep apart, in place: queries, keys and values, and the halves of gated MLPs.

    Keys have no bias there; zeros are the same. Frequencies of rotary positions go to the blocks. DINOv2's authors add
    the class token's position embedding, which is added to the class token here, and have none for register tokens.
    """
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        query, value = state.pop(name), state.pop(name.replace(".q_bias", ".v_bias"))
        state[name.replace(".q_bias", ".qkv.bias")] = np.concatenate([query, np.zeros_like(query), value])
    for name in [name for name in state if name.endswith(".attn.query.bias")]:
        state.setdefault(name.replace(".query.", ".key."), np.zeros_like(state[name]))
    pack_qkv(state)
    for name in [name for name in state if ".mlp.fc1_g." in name]:
        halves = state.pop(name), state.pop(name.replace("fc1_g", "fc1_x"))
        state[name.replace("fc1_g", "fc1")] = np.concatenate(halves)
    if "rope.freqs" in state:
        for i, freqs in enumerate(np.moveaxis(state.pop("rope.freqs"), 1, 0)):  # (2, heads, D / 2)
            state[f"blocks.{i}.attn.rope.freqs"] = freqs
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]


def unsupported_part(state: Mapping[str, np.ndarray]) -> str | None:
    """A part of the model that ours do not have."""
    for part, what in UNSUPPORTED.items():
        if found := next((key for key in state if key.startswith(part) or f".{part}" in key), None):
            return f"{what} ({found})"
    if found := next((key for key in state if "patch_embed.backbone." in key and not RESNET.fullmatch(key)), None):
        return f"a convolutional stem of another kind ({found})"
    if "norm.weight" in state and "fc_norm.weight" in state:
        return "layer norms before and after pooling (norm, fc_norm)"
    return None


def read_card(config: Mapping[str, Any]) -> dict[str, Any]:
    """A hub directory's config.json with its parts in one: the pretrained_cfg, the model_args and the top level.

    In older ones, all stands at the top level. Raises ValueError.
    """
    parts = [config.get(key) for key in ("pretrained_cfg", "model_args")]
    merged = {k: v for part in (*parts, config) if isinstance(part, dict) for k, v in without_null(part).items()}
    return checked(merged, FIELDS)


def labels(card: dict[str, Any]) -> tuple[str, ...]:
    """The class names: label_names, or what label_descriptions calls them."""
    described = card.get("label_descriptions", {})
    return tuple(described.get(name, name) for name in card.get("label_names", ()))


def read_config(state: dict[str, np.ndarray], card: dict[str, Any], name: str, files: WeightFiles) -> ViTConfig:
    """The config of the model; `card` also has what its name says. Raises KeyError, IndexError or ValueError."""
    embed_dim, in_chans, *patch = state[PATCHES].shape
    layers, stride = resnet_layers(state), 1
    if layers is not None:
        in_chans, stride = stem(state).shape[1], resnet.stride(layers)

    def has(part: str) -> bool:
        """Whether a block has such a weight."""
        return any(part in key for key in state if key.startswith("blocks."))

    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    swiglu = len(state["blocks.0.mlp.fc1.weight"]) == 2 * hidden
    rope = card.get("rope", "mixed" if has(".rope.freqs") else None)
    if rope is None and "pos_embed" not in state:
        raise ValueError("it has no position embeddings, and its name none that is known: name the file as its model")
    after, pool = "fc_norm.weight" in state, card.get("global_pool", "")
    norm_first = card.get("fc_norm") is False and pool == "avg"
    if rope in ("dinov3", "pe") and not after:  # these have a mean behind their norm
        norm_first = card.get("global_pool", card.get("usual_pool", "avg")) == "avg"
    mean = after or norm_first or "cls_token" not in state
    pooling = "map" if "attn_pool.latent" in state else "avg" if mean else "token"
    if pool not in ("", pooling):
        raise ValueError(f"global_pool is {pool!r}, but the norm is that of {pooling!r}")
    pre_logits = state.get("pre_logits.fc.weight")
    fields: dict[str, Any] = dict(
        patch_size=tuple(patch),
        resnet_layers=layers,
        in_chans=in_chans,
        num_classes=count_classes(state, "head.weight"),
        embed_dim=embed_dim,
        depth=count_blocks(state),
        num_heads=count_heads(files, card, name, embed_dim),
        mlp_ratio=mlp_ratio(hidden, embed_dim),
        swiglu=swiglu,
        qkv_bias=has(".attn.qkv.bias"),
        class_token="cls_token" in state,
        reg_tokens=state["reg_token"].shape[1] if "reg_token" in state else 0,
        distilled="dist_token" in state,
        global_pool=pooling,
        fc_norm=False if pooling == "avg" and not after else None,
        rope=rope,
        rope_grid=card.get("rope_grid"),
        norm="layer_norm" if has(".norm1.bias") else "rms_norm",
        embed_norm="patch_embed.norm.weight" in state,
        pre_norm="norm_pre.weight" in state,
        final_norm=after or any(f"norm.{kind}" in state for kind in ("weight", "bias")),
        proj_bias=has(".attn.proj.bias"),
        qk_norm=has(".attn.q_norm."),
        scale_attn_norm=has(".attn.norm."),
        scale_mlp_norm=has(".mlp.norm."),
        act="gelu" if swiglu else card.get("act_layer", "gelu"),
        init_values=LAYER_SCALE if has(".gamma") else None,
        representation_size=None if pre_logits is None else len(pre_logits),
    )
    large = fields["pre_norm"] or fields["embed_norm"] or rope == "dinov3" or (fields["scale_attn_norm"] and not rope)
    fields["norm_eps"] = card.get("norm_eps", LARGE_NORM_EPS if large else NORM_EPS)  # timm itself cannot say
    known = pairs(card.get("img_size"), (card.get("input_size") or [None])[1:], *timm_names.image_sizes(name))
    given = pairs(files.overrides.get("image_size"))
    if "pos_embed" not in state:
        return ViTConfig(**fields, pos_embed="none", image_size=[*given, *known, (224, 224)][0])
    prefix = sum(fields[key] for key in ("class_token", "reg_tokens", "distilled"))
    grid, sure = find_grid(state["pos_embed"].shape[1], prefix, (patch[0], patch[1]), stride, known, given)
    config = ViTConfig(**fields, **grid)
    if not sure:
        rows, columns = config.grid_size
        taken = f"{rows * columns} position embeddings are taken for {rows}x{columns} patches without a class token"
        warnings.warn(f"{files.path}: {taken}: give image_size if that is wrong", stacklevel=2)
    return config


def check_complete(config: ViTConfig, card: dict[str, Any], files: WeightFiles) -> None:
    """Raise ValueError where config.json tells of weights that are not there, or of pooling that is not supported."""
    if card.get("pool_include_prefix"):
        raise ValueError("its mean counts class and register tokens, too (pool_include_prefix), which is not supported")
    architecture = card.get("architecture", "").partition(".")[0]
    usual = registry.model_config(architecture) if architecture in registry.list_models() else config
    depth = card.get("depth", usual.depth)
    if config.depth != depth:
        raise ValueError(f"it has {config.depth} blocks, and its {CONFIG} says {depth}: weights are missing")
    if not config.final_norm and card.get("final_norm", usual.final_norm):
        raise ValueError(f"it has no norm behind the blocks, which {architecture} has: weights are missing")
    classes = card.get("num_classes", 0)
    if classes and not config.num_classes and "num_classes" not in files.overrides:
        raise ValueError(f"it has no head, and its {CONFIG} says {classes} classes: num_classes=0 takes it without one")


def count_heads(files: WeightFiles, card: dict[str, Any], name: str, embed_dim: int) -> int:
    """How many heads: from the config, else as the caller or a model's name (or size) says, else from the width.

    The last is warned of. `name` is the config's or, when it has none, the file's, which counts less than the caller.
    """
    if "num_heads" in card:
        return card["num_heads"]
    known, given = timm_names.heads(name, embed_dim), files.overrides.get("num_heads")
    if given is not None and (known is None or "architecture" not in card):
        return given
    if known is not None:
        return known
    heads = next(h for h in range(max(1, embed_dim // HEAD_WIDTH), 0, -1) if embed_dim % h == 0)
    warnings.warn(
        f"{files.path}: nothing says how many attention heads the model has, {heads} are assumed: give num_heads "
        "(--num-heads)",
        stacklevel=2,
    )
    return heads


def pairs(*sizes: Any) -> list[Size]:
    """Sizes as (height, width), without those that are None or of another form."""
    both = [(size, size) if isinstance(size, int) else tuple(size or ()) for size in sizes]
    return [pair for pair in both if len(pair) == 2]
