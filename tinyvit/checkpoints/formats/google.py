"""Google's .npz files: the paper's models, those of AugReg (Steiner et al. 2021, arXiv:2106.10270), and big_vision's.

The layout is that of github.com/google-research/vision_transformer: Flax kernels are (in, out), those of attention
are split into heads, and those of convolutions are (h, w, in, out); ours are (out, in) and (out, in, h, w). A hybrid's
ResNet runs with timm's epsilons (`tinyvit.models.resnet`), as all models here run with timm's GELU.

github.com/google-research/big_vision writes the same under other names, perhaps all blocks in one array, with position
embeddings for the patches alone; without a class token it takes the mean of the normalised tokens ("gap"), and without
position embeddings in the file it has sines and cosines (Beyer et al. 2022, arXiv:2205.01580).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.formats.common import (
    QKV,
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
)
from tinyvit.checkpoints.readers.weight_files import WeightFiles
from tinyvit.models import resnet
from tinyvit.models.config import ViTConfig
from tinyvit.models.parts import sincos2d
from tinyvit.models.preprocessing import Preprocessing

PREFIX = re.compile(r"^(opt/target/|params/(img/)?)")  # in files saved with their optimizer, and in big_vision's
PATCHES = "embedding/kernel"
NAMES = {  # theirs and ours
    "cls": "cls_token",
    "embedding": "patch_embed.proj",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "pos_embedding": "pos_embed",
    "Transformer/encoder_norm": "norm",
    "pre_logits": "pre_logits.fc",
    "head": "head",
}
BLOCK = {  # the same within a block, of which big_vision numbers the parts of each kind from 0
    "LayerNorm_0": "norm1",
    **{f"MultiHeadDotProductAttention_{i}/{part}": f"attn.{part}" for i in (0, 1) for part in QKV},
    **{f"MultiHeadDotProductAttention_{i}/out": "attn.proj" for i in (0, 1)},
    **{f"LayerNorm_{i}": "norm2" for i in (1, 2)},
    **{f"MlpBlock_{i}/Dense_{j}": f"mlp.fc{j + 1}" for i in (0, 3) for j in (0, 1)},
}
STACKED = "Transformer/encoderblock/"  # before the names of arrays that hold all blocks
RESNET = {  # the same before the patches
    "conv_root": "stem.conv",
    "gn_root": "stem.norm",
    "conv_proj": "downsample.conv",
    "gn_proj": "downsample.norm",
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"gn{i}": f"norm{i}" for i in (1, 2, 3)},
}
MOST_BLOCKS = 10_000
KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def recognises(names: Collection[str]) -> bool:
    return any(PREFIX.sub("", name) == PATCHES for name in names)


def read(files: WeightFiles) -> Checkpoint:
    """The model of an .npz file; its config follows from names and shapes. Raises CheckpointError."""
    if found := next((name for name in files.arrays if "MAPHead_" in name), None):
        raise CheckpointError(f"{files.path}: the model has attention pooling ({found}), which is not supported")
    with refusing(f"{files.path}: its weights describe no model of ours"):
        unstack(files)
        state = renamed(files, our_name)
        if resnet_layers(state) == ():  # a stem without stages has no name of its own
            state = {name.replace(".backbone.stem.", ".backbone."): array for name, array in state.items()}
        config = read_config(state, files)
        for name in state:
            state[name] = ours(name, state[name])
    pack_qkv(state)
    crop: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"}
    if config.pos_embed == "sincos2d":
        state["pos_embed"] = sincos2d(config.grid_size, config.embed_dim, config.num_patches)
        crop = {"crop_pct": 0.875, "crop_mode": "center"}
    half = (0.5,) * config.in_chans
    return Checkpoint(
        path=files.path,
        config=config,
        state=state,
        class_names=names_of_classes((), config.num_classes),
        preprocessing=Preprocessing(half, half, interpolation="bilinear", **crop),
    )


def unstack(files: WeightFiles) -> None:
    """Give each block an array of its own where one array holds those of all blocks. Raises ValueError or TypeError."""
    for name in [name for name in files.arrays if PREFIX.sub("", name).startswith(STACKED)]:
        blocks = files.arrays.pop(name)
        if len(blocks) > MOST_BLOCKS:
            raise ValueError(f"{name} has {len(blocks)} blocks, expected at most {MOST_BLOCKS}")
        for i, array in enumerate(blocks):
            files.arrays[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = array


def our_name(name: str) -> str:
    """Our name of a weight, or the name as it is when we have none."""
    theirs = PREFIX.sub("", name)
    if theirs in NAMES:
        return NAMES[theirs]
    module, _, kind = theirs.rpartition("/")
    block = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", module)
    if block and block[2] in BLOCK and kind in KINDS:
        return f"blocks.{block[1]}.{BLOCK[block[2]]}.{KINDS[kind]}"
    unit = re.fullmatch(r"(?:block([1-9]\d*)/unit([1-9]\d*)/)?(\w+)", module)
    if unit and unit[3] in RESNET and kind in KINDS and (unit[1] is None) == unit[3].endswith("_root"):
        place = f"stages.{int(unit[1]) - 1}.blocks.{int(unit[2]) - 1}." if unit[1] else ""
        return f"patch_embed.backbone.{place}{RESNET[unit[3]]}.{KINDS[kind]}"
    return f"{NAMES[module]}.{KINDS[kind]}" if module in NAMES and kind in KINDS else name


def read_config(state: dict[str, np.ndarray], files: WeightFiles) -> ViTConfig:
    """The config that the still untransposed weights have. Raises KeyError, IndexError, TypeError or ValueError."""
    height, width, in_chans, embed_dim = state["patch_embed.proj.weight"].shape
    layers, stride = resnet_layers(state), 1
    if layers is not None:
        in_chans, stride = stem(state).shape[2], resnet.stride(layers)
    token = "cls_token" in state
    if token or "pos_embed" in state:
        grid, _ = find_grid(state["pos_embed"].shape[1], int(token), (height, width), stride)
    else:
        grid = dict(image_size=files.overrides.get("image_size", 224), pos_embed="sincos2d")
    return ViTConfig(
        **grid,
        class_token=token,
        global_pool="token" if token else "avg",
        fc_norm=None if token else False,
        patch_size=(height, width),
        resnet_layers=layers,
        in_chans=in_chans,
        num_classes=count_classes(state, "head.bias"),
        embed_dim=embed_dim,
        depth=count_blocks(state),
        num_heads=state["blocks.0.attn.query.weight"].shape[1],
        mlp_ratio=mlp_ratio(state["blocks.0.mlp.fc1.weight"].shape[1], embed_dim),
        representation_size=len(state["pre_logits.fc.bias"]) if "pre_logits.fc.bias" in state else None,
    )


def ours(name: str, array: np.ndarray) -> np.ndarray:
    """An array in our layout."""
    if re.search(r"^patch_embed\..*norm\d?\.", name):  # some are (1, 1, 1, C)
        return array.reshape(-1)
    if name.startswith("patch_embed.") and name.endswith("weight"):
        return array.transpose(3, 2, 0, 1)
    if re.search(r"attn\.(query|key|value)\.", name):
        return array.reshape(len(array), -1).T if name.endswith("weight") else array.reshape(-1)
    if name.endswith("attn.proj.weight"):
        return array.reshape(-1, array.shape[-1]).T
    return array.T if name.endswith("weight") else array
