"""timm's ViT, DeiT and hybrids: state dicts in .safetensors and .pth files, and hub directories. Their names are ours.

A state dict alone says nearly everything by its names and shapes; what it cannot say is taken from config.json in a
hub directory, from a model's name in the file name, or from what timm does by default.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import PREPROCESSING, Checkpoint, CheckpointError, checked_preprocessing
from tinyvit.checkpoints.formats.common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    count_classes,
    mlp_ratio,
    names_of_classes,
    pack_qkv,
    renamed,
    resnet_layers,
    stem,
    without_null,
    write_directory,
)
from tinyvit.checkpoints.native_file import write_checkpoint
from tinyvit.checkpoints.readers.common import reason
from tinyvit.checkpoints.readers.weight_files import CONFIG, WeightFiles
from tinyvit.files.fields import boolean, checked, either, integer, list_of, number, one_of, text
from tinyvit.models import registry, resnet
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing

PATCHES = "patch_embed.proj.weight"
PROJECTIONS = {"q": "query", "k": "key", "v": "value"}
HEAD_WIDTH = 64  # of an attention head in nearly all published models
NAMED_HEADS = (  # what a model's name says, its width, and its heads where they are not HEAD_WIDTH wide
    ("giant_", 1408, 16),  # Zhai et al. 2021, arXiv:2106.04560, table 2
    ("gigantic_", 1664, 16),
    ("so400m_", 1152, 16),
    ("giantopt_", 1536, 16),
    ("base_patch16_gap_", 768, 16),
    ("huge_plus_", 1280, 20),
    ("vit_pe_", 1536, 16),
    ("vit_7b_", 4096, 32),
    *(("aimv2_", 128 * heads, heads) for heads in (8, 12, 16, 24)),
)
# Models to which timm gives the tanh GELU by their names alone.
TANH_NAMES = re.compile(r"(so400m|giantopt)_patch16_siglip|base_patch32_siglip|large_patch16_siglip_(gap_)?512")
LAYER_SCALE = 1e-5  # its usual start value
NORM_EPS, LARGE_NORM_EPS = 1e-6, 1e-5
ROPES = (  # what a model's name says of its rotary positions: the kind, and the grid of patches they were trained on
    (r"dinov3|lingbot", "dinov3", None),
    (r"vit_pe_core_base", "pe", 14),
    (r"vit_pe_core_(tiny|small|large)", "pe", 24),
    (r"vit_pe_", "pe", 32),
    (r"_rope_mixed", "mixed", None),
    (r"_rope_reg\d", "eva", 16),
    (r"_rope_", "axial", None),
    (r"eva02_", "eva", 16),
)
UNSUPPORTED = {  # parts of timm's other models, and what they are
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "attn.gate.": "gated attention",
    "attn.lambda_": "differential attention",
    "attns.": "several attentions side by side",
    "in_proj.": "attention and MLP side by side",
    "decoder_": "a decoder",
}
UNSUPPORTED_NAMES = {  # models that their weights do not tell apart from ours
    "_rpn_": "its norms behind attention and MLP (rpn)",
    "eva02_enormous": "its norms behind attention and MLP",
    "sapiens2": "fewer keys than queries",
    "vit_pe_core": "attention pooling of the class token, too",
    "test_vit3": "attention pooling of the register tokens, too",
}
RESNET = re.compile(  # the parts of the ResNet that ours is, with stages or without
    r"patch_embed\.backbone\.((stem\.)?(conv|norm)|stages\.\d+\.blocks\.\d+\.(downsample\.(conv|norm)|(conv|norm)[123]))\.\w+"
)
# The stages of blocks that timm has models with, and one of those models each: it takes all but these from model_args.
HYBRIDS = {
    layers: name
    for name in reversed(registry.list_models())
    if (layers := registry.model_config(name).resnet_layers) is not None
}
IMAGENET_FAMILIES = re.compile(r"deit|dino|mae(?![a-z])")  # trained with ImageNet's mean and std, the others with 0.5
UNUSED = ("mask_token",)  # of pre-training by masked images


def descriptions(value: Any) -> dict[str, str]:
    """label_descriptions: an object of texts."""
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ValueError("expected an object of texts")
    return value


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
    "label_descriptions": descriptions,
    "fc_norm": either(boolean, text),
    **PREPROCESSING,
}


def recognises(names: Collection[str]) -> bool:
    return PATCHES in names or any(re.match(r"blocks\.\d+\.", name) for name in names)


def read(files: WeightFiles) -> Checkpoint:
    """The model of a state dict. Raises CheckpointError."""
    for unused in [name for name in files.arrays if name in UNUSED]:
        del files.arrays[unused]
    state = renamed(files, our_name)
    try:
        pack(state)
        card = read_card(files.config)
    except ValueError as error:
        raise CheckpointError(f"{files.path}: its {CONFIG} cannot be followed: {reason(error)}") from None
    name = card.get("architecture", files.path.name)[:255]
    if part := unsupported_part(state, name):
        raise CheckpointError(f"{files.path}: the model has {part}, which is not supported")
    try:
        config = read_config(state, card, name, files)
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{files.path}: its weights describe no model of ours: {reason(error)}") from None
    return Checkpoint(
        path=files.path,
        config=config,
        state=state,
        class_names=names_of_classes(labels(card), config.num_classes),
        preprocessing=read_preprocessing(files.path, card, name, config),
    )


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


def unsupported_part(state: dict[str, np.ndarray], name: str) -> str | None:
    """A part of the model that ours do not have."""
    for part, what in UNSUPPORTED.items():
        if found := next((key for key in state if key.startswith(part) or f".{part}" in key), None):
            return f"{what} ({found})"
    if found := next((key for key in state if "patch_embed.backbone." in key and not RESNET.fullmatch(key)), None):
        return f"a convolutional stem of another kind ({found})"
    if "norm.weight" in state and "fc_norm.weight" in state:
        return "layer norms before and after pooling (norm, fc_norm)"
    return next((what for part, what in UNSUPPORTED_NAMES.items() if part in name), None)


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
    """The config of the model. Raises KeyError, IndexError, TypeError or ValueError."""
    embed_dim, in_chans, *patch = state[PATCHES].shape
    layers, stride = resnet_layers(state), 1
    if layers is not None:
        in_chans, stride = stem(state).shape[1], resnet.stride(layers)
    blocks = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)}

    def has(part: str) -> bool:
        """Whether a block has such a weight."""
        return any(part in key for key in state if key.startswith("blocks."))

    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    swiglu = len(state["blocks.0.mlp.fc1.weight"]) == 2 * hidden
    rope, rope_grid = find_rope(state, name)
    after = "fc_norm.weight" in state
    norm_first = card.get("fc_norm") is False and card.get("global_pool") == "avg"
    if rope in ("dinov3", "pe") and not after:  # these have a mean behind their norm
        norm_first = card.get("global_pool", "token" if "lingbot" in name else "avg") == "avg"
    mean = after or norm_first or "cls_token" not in state
    pooling = "map" if "attn_pool.latent" in state else "avg" if mean else "token"
    if card.get("global_pool", "") not in ("", pooling):
        raise ValueError(f"global_pool is {card['global_pool']!r}, but the norm is that of {pooling!r}")
    pre_logits = state.get("pre_logits.fc.weight")
    fields: dict[str, Any] = dict(
        patch_size=tuple(patch),
        resnet_layers=layers,
        in_chans=in_chans,
        num_classes=count_classes(state, "head.weight"),
        embed_dim=embed_dim,
        depth=max(blocks, default=0) + 1,
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
        rope_grid=rope_grid,
        norm="layer_norm" if has(".norm1.bias") else "rms_norm",
        embed_norm="patch_embed.norm.weight" in state,
        pre_norm="norm_pre.weight" in state,
        final_norm=after or any(f"norm.{kind}" in state for kind in ("weight", "bias")),
        proj_bias=has(".attn.proj.bias"),
        qk_norm=has(".attn.q_norm."),
        scale_attn_norm=has(".attn.norm."),
        scale_mlp_norm=has(".mlp.norm."),
        act="gelu" if swiglu else card.get("act_layer", find_act(name)),
        init_values=LAYER_SCALE if has(".gamma") else None,
        representation_size=None if pre_logits is None else len(pre_logits),
    )
    large = fields["pre_norm"] or fields["embed_norm"] or rope == "dinov3" or (fields["scale_attn_norm"] and not rope)
    fields["norm_eps"] = card.get("norm_eps", LARGE_NORM_EPS if large else NORM_EPS)  # timm itself cannot say
    if "pos_embed" not in state:
        known = [*pairs(files.overrides.get("image_size")), *image_sizes(card, name), (224, 224)]
        return ViTConfig(**fields, pos_embed="none", image_size=known[0])
    prefix = sum(fields[key] for key in ("class_token", "reg_tokens", "distilled"))
    grid = find_grid(state["pos_embed"].shape[1], prefix, tuple(patch), stride, image_sizes(card, name), files)
    return ViTConfig(**fields, **grid)


def find_act(name: str) -> str:
    """The activation that timm gives a model by its name."""
    return "quick_gelu" if "quickgelu" in name else "gelu_tanh" if TANH_NAMES.search(name) else "gelu"


def find_rope(state: Mapping[str, np.ndarray], name: str) -> tuple[str | None, tuple[int, int] | None]:
    """The kind of rotary positions and the grid that they were trained on. Raises ValueError where nothing says it."""
    for part, kind, side in ROPES:
        if re.search(part, name):
            return kind, None if side is None else (side, side)
    if any(key.endswith(".rope.freqs") for key in state):
        return "mixed", None
    if "pos_embed" not in state:
        raise ValueError("it has no position embeddings, and its name none that is known: name the file as its model")
    return None, None


def count_heads(files: WeightFiles, card: dict[str, Any], name: str, embed_dim: int) -> int:
    """How many heads: from the config, else from a model's name (or size) in `name`, else from the width, warned of."""
    if "num_heads" in card:
        return card["num_heads"]
    for part, width, heads in NAMED_HEADS:
        if part in name and width == embed_dim:
            return heads
    models = registry.list_models()
    by_name = [model for model in models if model in name]
    by_size = [model for model in models if re.search(rf"(?<![a-z]){model.split('_')[1]}(?![a-z])", name)]
    for config in map(registry.model_config, by_name + by_size):
        if config.embed_dim == embed_dim:
            return config.num_heads
    heads = next(h for h in range(max(1, embed_dim // HEAD_WIDTH), 0, -1) if embed_dim % h == 0)
    if "num_heads" not in files.overrides:
        warnings.warn(
            f"{files.path}: nothing says how many attention heads the model has, {heads} are assumed: give num_heads "
            "(--num-heads)",
            stacklevel=2,
        )
    return heads


def find_grid(
    embedded: int, prefix: int, patch: tuple[int, int], stride: int, known: list[tuple[int, int]], files: WeightFiles
) -> dict[str, Any]:
    """image_size, trim_image and no_embed_class for `embedded` position embeddings.

    They are of patches alone, or of `prefix` other tokens, too. The sizes in `known` are preferred, then a square of
    patches. `stride` is that of the ResNet before the patches, 1 without one. Raises ValueError when nothing fits.
    """

    given = pairs(files.overrides.get("image_size"))

    def square(patches: int) -> tuple[int, int]:
        side = math.isqrt(max(patches, 0)) * stride
        return side * patch[0], side * patch[1]

    tries = [(size, no_embed_class) for no_embed_class in (False, True) for size in known]
    tries += [*((size, False) for size in given), (square(embedded - prefix), False)]
    for (height, width), no_embed_class in [*tries, (square(embedded), True)]:
        features = -(-height // stride), -(-width // stride)  # rounded up
        rows, columns = features[0] // patch[0], features[1] // patch[1]
        count = rows * columns + (0 if no_embed_class else prefix)
        trim = (rows * patch[0], columns * patch[1]) != features
        if rows and count == embedded and not (trim and stride > 1):
            if no_embed_class and prefix and (height, width) not in [*known, *given]:
                taken = f"{embedded} position embeddings are taken for {rows}x{columns} patches without a class token"
                warnings.warn(f"{files.path}: {taken}: give image_size if that is wrong", stacklevel=2)
            no_embed_class = no_embed_class and prefix > 0
            return {"image_size": (height, width), "no_embed_class": no_embed_class, "trim_image": trim}
    raise ValueError(f"{embedded} position embeddings do not fit a square of patches and {prefix} other tokens")


def image_sizes(card: dict[str, Any], name: str) -> list[tuple[int, int]]:
    """Image sizes in the config and in the name."""
    in_name = map(int, re.findall(r"(?:patch|_[sp])\d+_(?:\w+_)?(\d{2,4})(?!\d)", name))
    return pairs(card.get("img_size"), (card.get("input_size") or [None])[1:], *in_name)


def pairs(*sizes: Any) -> list[tuple[int, int]]:
    """Sizes as (height, width), without those that are None or of another form."""
    both = [(size, size) if isinstance(size, int) else tuple(size or ()) for size in sizes]
    return [pair for pair in both if len(pair) == 2]


def read_preprocessing(path: Path, card: dict[str, Any], name: str, config: ViTConfig) -> Preprocessing:
    """What the config says, else timm's usual values. Raises CheckpointError."""
    imagenet = config.distilled or IMAGENET_FAMILIES.search(name)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else ((0.5,) * config.in_chans,) * 2
    usual = {"mean": mean, "std": std, "crop_pct": 0.9 if max(config.image_size) < 384 else 1.0}
    try:
        return checked_preprocessing({**usual, **card}, config.in_chans)
    except ValueError as error:
        raise CheckpointError(f"{path}: its {CONFIG} cannot be followed: {reason(error)}") from None


# Settings that are written where they differ from timm's, and those for which a config.json has no place.
PARTS = {
    "pre_norm": False, "final_norm": True, "proj_bias": True, "qk_norm": False, "scale_attn_norm": False,
    "scale_mlp_norm": False,
}  # fmt: skip
NOT_IN_CARDS = {"swiglu": False, "norm": "layer_norm", "embed_norm": False, "rope": None}

# --- writing --------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a hub directory, or with a name ending in .safetensors the state dict in one file.

    `timm.create_model("local-dir:PATH", pretrained=True)` opens the directory. Raises CheckpointError for a part that
    timm's models do not have; warns of an epsilon that they do not take.
    """
    config = checkpoint.config
    if config.representation_size:
        raise CheckpointError(f"{path}: timm's models have no layer between pooling and head (pre_logits)")
    theirs = LARGE_NORM_EPS if config.pre_norm else NORM_EPS
    if config.norm_eps != theirs:
        warnings.warn(f"timm's layer norms have epsilon {theirs:g}, this model's {config.norm_eps:g}", stacklevel=2)
    if path.suffix == ".safetensors":
        write_checkpoint(
            checkpoint, path
        )  # our names are timm's; what they cannot say goes into metadata, for us alone
    elif config.conv_chans is not None or config.global_pool == "seq":
        raise CheckpointError(
            f"{path}: timm has no model with a convolutional tokenizer or sequence pooling; write a .safetensors file"
        )
    elif config.resnet_layers is not None and (config.resnet_layers not in HYBRIDS or config.distilled):
        stages = f"stages of {config.resnet_layers} blocks before its patches"
        what = "a distilled hybrid" if config.distilled else stages
        raise CheckpointError(f"{path}: timm has no model with {what}; write a .safetensors file")
    elif part := next((name for name, usual in NOT_IN_CARDS.items() if getattr(config, name) != usual), None):
        raise CheckpointError(f"{path}: timm's config.json cannot say {part}; write a .safetensors file")
    else:
        write_directory(path, checkpoint.state, {CONFIG: json.dumps(write_card(checkpoint), indent=2)})


def write_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """A hub directory's config.json. model_args makes any architecture the model at hand."""
    from tinyvit.data.image import usual_crop

    c, p = checkpoint.config, checkpoint.preprocessing
    architecture, first = "vit_base_patch16_224", "patch_embed.proj"
    if c.resnet_layers is not None:
        architecture = HYBRIDS[c.resnet_layers]
        first = "patch_embed.backbone.stem.conv" if c.resnet_layers else "patch_embed.backbone.conv"
    elif c.pre_norm:  # for its epsilon
        architecture = "vit_base_patch16_clip_224"
    model_args = {
        "img_size": list(c.image_size),
        "patch_size": list(c.patch_size),
        "in_chans": c.in_chans,
        "embed_dim": c.embed_dim,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "mlp_ratio": c.mlp_ratio,
        "qkv_bias": c.qkv_bias,
        "class_token": c.class_token,
        "global_pool": c.global_pool,
        "act_layer": c.act,
        "no_embed_class": c.no_embed_class,
        "reg_tokens": c.reg_tokens,
    }
    model_args |= {name: getattr(c, name) for name, usual in PARTS.items() if getattr(c, name) != usual}
    model_args |= {name: getattr(c, name) for name in ("init_values", "fc_norm") if getattr(c, name) is not None}
    return {
        "architecture": "deit_base_distilled_patch16_224" if c.distilled else architecture,
        "num_classes": c.num_classes,
        "num_features": c.embed_dim,
        "global_pool": c.global_pool,
        "model_args": model_args,
        "norm_eps": c.norm_eps,
        "label_names": list(checkpoint.class_names),
        "pretrained_cfg": {
            "input_size": [c.in_chans, *c.image_size],
            "mean": list(p.mean),
            "std": list(p.std),
            "crop_pct": usual_crop(c.image_size) if p.crop_pct is None else p.crop_pct,
            "crop_mode": p.crop_mode,
            "interpolation": p.interpolation,
            "num_classes": c.num_classes,
            "first_conv": first,
            "classifier": ["head", "head_dist"] if c.distilled else "head",
        },
    }
