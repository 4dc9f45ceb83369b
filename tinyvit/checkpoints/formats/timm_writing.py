"""Writing a hub directory that timm opens, or its state dict in one file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tinyvit.checkpoints.checkpoint import Checkpoint, CheckpointError
from tinyvit.checkpoints.formats.common import write_directory
from tinyvit.checkpoints.formats.timm import LARGE_NORM_EPS, NORM_EPS
from tinyvit.checkpoints.native_file import write_checkpoint
from tinyvit.checkpoints.readers.weight_files import CONFIG
from tinyvit.models import registry
from tinyvit.models.config import ViTConfig

# The stages of blocks that timm has models with, and one of those models each: it takes all but these from model_args.
HYBRIDS = {
    layers: name
    for name in reversed(registry.list_models())
    if (layers := registry.model_config(name).resnet_layers) is not None
}
ALWAYS = (  # settings that are written, with the same names
    "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "class_token", "global_pool",
    "no_embed_class", "reg_tokens",
)  # fmt: skip
# Those that are written where they differ from the usual, and those for which a config.json has no place.
SOMETIMES = (
    "pre_norm", "final_norm", "proj_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "init_values", "fc_norm",
)  # fmt: skip
NEVER = ("swiglu", "norm", "embed_norm", "rope")


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
    if path.suffix == ".safetensors":  # our names are timm's; what they cannot say goes into metadata, for us alone
        write_checkpoint(checkpoint, path)
    elif problem := without_place(config):
        raise CheckpointError(f"{path}: {problem}; write a .safetensors file")
    else:
        write_directory(path, checkpoint.state, {CONFIG: json.dumps(write_card(checkpoint), indent=2)})


def unusual(config: ViTConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the settings that are not what they usually are."""
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(ViTConfig, name)}


def without_place(config: ViTConfig) -> str | None:
    """What of a model has no place in a hub directory."""
    if config.conv_chans is not None or config.global_pool == "seq":
        return "timm has no model with a convolutional tokenizer or sequence pooling"
    if config.resnet_layers is not None and config.distilled:
        return "timm has no model with a distilled hybrid"
    if config.resnet_layers is not None and config.resnet_layers not in HYBRIDS:
        return f"timm has no model with stages of {config.resnet_layers} blocks before its patches"
    return next((f"timm's config.json cannot say {name}" for name in unusual(config, NEVER)), None)


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
    return {
        "architecture": "deit_base_distilled_patch16_224" if c.distilled else architecture,
        "num_classes": c.num_classes,
        "num_features": c.embed_dim,
        "global_pool": c.global_pool,
        "model_args": {
            "img_size": c.image_size,
            "act_layer": c.act,
            **{name: getattr(c, name) for name in ALWAYS},
            **unusual(c, SOMETIMES),
        },
        "norm_eps": c.norm_eps,
        "label_names": checkpoint.class_names,
        "pretrained_cfg": {
            "input_size": [c.in_chans, *c.image_size],
            "mean": p.mean,
            "std": p.std,
            "crop_pct": usual_crop(c.image_size) if p.crop_pct is None else p.crop_pct,
            "crop_mode": p.crop_mode,
            "interpolation": p.interpolation,
            "num_classes": c.num_classes,
            "first_conv": first,
            "classifier": ["head", "head_dist"] if c.distilled else "head",
        },
    }
