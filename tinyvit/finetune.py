"""Fine-tuning: a new head on old weights, and parts of a model that stay as they are."""

from __future__ import annotations

import numpy as np

from tinyvit import nn, random
from tinyvit.groups import in_head, layer_number
from tinyvit.vit import VisionTransformer

ALL_BUT_HEAD = "all-but-head"


def init_head(model: VisionTransformer, how: str, seed: int = 0) -> None:
    """Give the model a new classifier (a distilled one two): all zeros, or "normal" weights with zero biases.

    "zeros" is the paper's (Dosovitskiy et al. 2020, section 3.2); "normal" is cut at two standard deviations of 0.02 and
    drawn from `seed`.
    """
    if how not in ("zeros", "normal"):
        raise ValueError(f"a head begins with zeros or normal weights, got {how!r}")
    with random.scope(seed):
        for name, p in model.named_parameters():
            if in_head(name):
                drawn = how == "normal" and p.ndim > 1
                values = nn.truncated_normal(p.shape, 0.02) if drawn else np.zeros(p.shape)
                p.data = values.astype(p.dtype)


def freeze(model: VisionTransformer, part: str | int) -> None:
    """Keep weights as they are: "all-but-head", or N for the embeddings (patches, tokens, positions) and N blocks.

    What is frozen gets no gradient, and as nothing below it does either, no backward pass runs there. It also computes
    as in evaluation, without dropout and drop path, which would only add noise to what cannot adapt to it; a later
    `model.train()` would switch them on again.

    Raises:
        ValueError: the model has no such part.
    """
    depth = model.config.depth
    if part != ALL_BUT_HEAD and not (isinstance(part, int) and 0 <= part <= depth):
        raise ValueError(f"expected {ALL_BUT_HEAD} or 0 to {depth} blocks to freeze, got {part}")

    def frozen(name: str) -> bool:
        if part == ALL_BUT_HEAD:
            return not in_head(name) and name != "head_drop"
        return layer_number(name, depth) <= part

    for name, p in model.named_parameters():
        if frozen(name):
            p.requires_grad = False
    for name, module in model.named_modules():
        if name and frozen(name):
            module.training = False
