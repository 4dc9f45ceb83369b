"""What Transformers calls our weights: a table for each family of its models, written one way and read the other."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tinyvit.checkpoints.formats.common import QKV

VIT = {  # ours and theirs, modules or single weights; from "norm1" on within a block
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "pre_logits.fc": "pooler.dense",
    "head": "classifier",
    "head_dist": "distillation_classifier",
    "blocks": "encoder.layer",
    "norm1": "layernorm_before",
    **{f"attn.{part}": f"attention.attention.{part}" for part in QKV},
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
TEACHER = {**VIT, "head": "cls_classifier"}  # DeiT with two heads
DINOV2 = {
    **VIT,
    "reg_token": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    **{name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
DINOV2_GATED = {**DINOV2, "mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
DINOV3 = {
    **DINOV2,
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
    "blocks": "layer",
    **{f"attn.{part}": f"attention.{part[0]}_proj" for part in QKV},
    "attn.proj": "attention.o_proj",
    "mlp.fc1_g": "mlp.gate_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
SIGLIP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "attn_pool.latent": "head.probe",
    "attn_pool.in_proj.weight": "head.attention.in_proj_weight",
    "attn_pool.in_proj.bias": "head.attention.in_proj_bias",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
    "head": "classifier",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    **{f"attn.{part}": f"self_attn.{part[0]}_proj" for part in QKV},
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
CLIP_PROJECTION = {**SIGLIP, "head": "visual_projection"}
TABLES = (VIT, TEACHER, DINOV2, DINOV2_GATED, DINOV3, SIGLIP, CLIP_PROJECTION)
OURS = {theirs: ours for table in TABLES for ours, theirs in table.items()}  # no name means two things
TOWERS = re.compile(r"^(model\.)?((vit|deit|vision_model|dinov2|dinov2_with_registers|dinov3_vit)\.)?")
UNUSED = re.compile(  # in pre-training alone, or by the text tower
    r"text_model\.|text_projection\.|decoder\.|logit_(scale|bias)$|(.*\.)?(embeddings\.)?(mask_token|position_ids)$"
)


def our_name(name: str) -> str:
    """Our name of a weight, or the name as it is when we have none."""
    plain = TOWERS.sub("", name)
    block = re.fullmatch(r"(?:encoder\.)?layers?\.(\d+)\.(.+)", plain)  # Transformers 5 leaves out parts in memory
    found = translated(block[2] if block else plain, OURS)
    return name if found is None else f"blocks.{block[1]}.{found}" if block else found


def their_name(name: str, table: Mapping[str, str], prefix: str) -> str:
    """Their name of one of our weights, behind `prefix` unless it belongs to a head. Raises KeyError."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    found = translated(block[2] if block else name, table)
    if found is None:
        raise KeyError(name)
    found = f"{table['blocks']}.{block[1]}.{found}" if block else found
    return found if name.startswith(("head.", "head_dist.")) else prefix + found


def translated(name: str, table: Mapping[str, str]) -> str | None:
    """The name that a table gives a weight, by itself or by its module."""
    if name in table:
        return table[name]
    module, _, kind = name.rpartition(".")
    return f"{table[module]}.{kind}" if module in table else None
