"""Which of a model's parameters learn how fast, and which of them decay."""

from __future__ import annotations

from typing import Any

_HEADS = ("head", "head_dist")
_BEHIND_THE_BLOCKS = ("norm", "fc_norm", "seq_pool", "pre_logits", "head_drop", *_HEADS)


def layer_number(name: str, depth: int) -> int:
    """How deep a VisionTransformer's parameter or module lies (Bao et al. 2021, BEiT, arXiv:2106.08254).

    0 for the patch embedding, tokens and position embeddings, i + 1 for block i, depth + 1 for what comes behind those.
    """
    part, _, rest = name.partition(".")
    if part == "blocks":
        return int(rest.partition(".")[0]) + 1
    return depth + 1 if part in _BEHIND_THE_BLOCKS else 0


def in_head(name: str) -> bool:
    """Whether a VisionTransformer's parameter or module belongs to its classifier (of a distilled one, its two)."""
    return name.partition(".")[0] in _HEADS


def hidden_matrix(name: str, p: Any) -> bool:
    """Whether a VisionTransformer's parameter is a matrix, or a convolution, between its input and its head."""
    return p.data.ndim >= 2 and name.startswith(("blocks.", "patch_embed.convs.", "patch_embed.backbone."))


def param_groups(
    model: Any,
    weight_decay: float,
    *,
    layer_decay: float = 1.0,
    head_lr_scale: float = 1.0,
    adam_lr_scale: float | None = None,
) -> list[dict[str, Any]]:
    """The model's parameters that are not frozen, in groups of one weight decay and learning rate each.

    Biases, norms and layer scale (all of one dimension), tokens and position embeddings get no weight decay.

    Args:
        model: a VisionTransformer.
        weight_decay: of all others.
        layer_decay: each layer learns at this share of the rate of the one above it: `lr_scale` is
            layer_decay ** (depth + 1 - number), with the `layer_number` of BEiT and MAE; 1 for no difference.
        head_lr_scale: the head's learning rate over that of the layer below it.
        adam_lr_scale: for `Muon`, the learning rate of what is no hidden matrix, over that of these; else None.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie above 0 and be at most 1, got {layer_decay!r}")
    depth = model.config.depth if layer_decay != 1 else 0
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        undecayed = p.data.ndim <= 1 or name.endswith(("_token", "pos_embed"))
        scale = layer_decay ** (depth + 1 - layer_number(name, depth)) if layer_decay != 1 else 1.0
        scale *= head_lr_scale if in_head(name) else 1.0
        muon = adam_lr_scale is not None and hidden_matrix(name, p)
        if adam_lr_scale is not None and not muon:
            scale *= adam_lr_scale
        options = {"weight_decay": 0.0 if undecayed else weight_decay, "lr_scale": scale} | (
            {"muon": True} if muon else {}
        )
        groups.setdefault((scale, undecayed, muon), {"params": [], **options})["params"].append(p)
    return [groups[key] for key in sorted(groups)]
