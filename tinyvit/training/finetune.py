"""Fine-tuning: a new head on old weights, and parts of a model that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyvit import nn
from tinyvit.backend import arrays, random
from tinyvit.engine.tensor import Array, Tensor
from tinyvit.models.vit import VisionTransformer
from tinyvit.optim.param_groups import in_head, layer_number
from tinyvit.training.config import ALL_BUT_HEAD


def init_head(model: VisionTransformer, how: str, seed: int = 0) -> None:
    """Give the model a new classifier (a distilled one two): all zeros, or "normal" weights with zero biases.

    "zeros" is the paper's (Dosovitskiy et al. 2020, section 3.2); "normal" is cut at two standard deviations of 0.02
    and drawn from `seed`.
    """
    with random.scope(seed, step=1):  # the other weights of a new model are drawn in step 0
        for name, p in model.named_parameters():
            if in_head(name):
                drawn = how == "normal" and p.ndim > 1
                values = nn.init.truncated_normal(p.shape, 0.02) if drawn else np.zeros(p.shape)
                p.data = values.astype(p.dtype)


def order_head(model: VisionTransformer, order: Sequence[int]) -> None:
    """Give the model's classes another order: the new class i is the old class `order[i]`."""
    for name, p in model.named_parameters():
        if in_head(name):
            p.data = p.data[list(order)]


def freeze(model: VisionTransformer, part: str | int) -> None:
    """Keep weights as they are: "all-but-head", or N for the embeddings (patches, tokens, positions) and N blocks.

    What is frozen gets no gradient, and as nothing below it does either, no backward pass runs there. It also computes
    as in evaluation, without dropout and drop path, which would only add noise to what cannot adapt to it;
    `model.train()` leaves that as it is, and `model.requires_grad_(True).train()` thaws everything.

    Raises:
        ValueError: the model has no such part.
    """
    depth = model.config.depth
    if part != ALL_BUT_HEAD and not (isinstance(part, int) and 0 <= part <= depth):
        raise ValueError(f"expected {ALL_BUT_HEAD} or 0 to {depth} blocks to freeze, got {part}")

    def frozen(name: str) -> bool:
        if part == ALL_BUT_HEAD:
            return not in_head(name) and name != "head_drop"
        return layer_number(name, depth) <= int(part)

    for name, p in model.named_parameters():
        if frozen(name):
            p.requires_grad = False
    for name, module in model.named_modules():
        if name and frozen(name):
            module.frozen, module.training = True, False


def class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes,) float32: N / (num_classes count) for each class of the labels (N,), so that all weigh the same."""
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32)


class Head(nn.Module):
    """The rest of the model: what it reads -> logits (B, num_classes). Its parameters are the head's alone."""

    def __init__(self, model: VisionTransformer) -> None:
        self.head, self.head_dist, self.head_drop = model.head, model.head_dist, model.head_drop
        self.classify = model.classify

    def forward(self, features: Array) -> Tensor:
        weight = self.parameters()[0].data
        x = Tensor(arrays.astype(arrays.convert(features, weight), weight.dtype))
        if self.head_dist is None:
            return self.classify(x)
        width = weight.shape[1]
        return self.classify(x[:, :width], x[:, width:])
