"""Looking inside a model: attention weights, attention rollout, and features of any block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tinyvit import functional as F
from tinyvit import nn
from tinyvit.engine.ops import concat, stack
from tinyvit.engine.tensor import Array, Tensor, no_grad

if TYPE_CHECKING:
    from tinyvit.models.vit import Attention, VisionTransformer


def attention_maps(model: VisionTransformer, images: Tensor | Array) -> Tensor:
    """The softmax attention weights of every block, in evaluation mode and with nothing recorded.

    Args:
        images: (B, C, H, W), floating.

    Returns:
        (depth, B, num_heads, N, N) in the model's library and dtype. Row i of the last two axes says how much token i
        reads of each token (it sums to 1); the `config.num_prefix_tokens` first are class, distillation and register
        tokens, the others patches, row by row. It takes 4 * depth * B * num_heads * N^2 bytes.
    """
    with no_grad(), nn.evaluating():
        return stack(list(_maps(model, images)))


def _maps(model: VisionTransformer, images: Tensor | Array) -> Iterator[Tensor]:
    """Each block's attention weights (B, H, N, N), one after the other, so that they need not all be kept.

    Between them stands what `vit.Block` computes in evaluation, with the weights that are there already.
    """
    x = model.first_tokens(images)
    *blocks, last = model.blocks
    for block in blocks:
        weights, values = _attention(block.attn, block.norm1(x))
        yield weights
        read = (weights @ values).permute_dims(0, 2, 1, 3).reshape(*x.shape)  # (B, N, H D)
        x = x + block.ls1(block.attn.proj(read))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    yield _attention(last.attn, last.norm1(x))[0]


def _attention(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of normalised tokens (B, N, H D): softmax(q k^T / sqrt(D)), (B, H, N, N), and the values v, (B, H, N, D)."""
    batch, tokens, dim = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(batch, tokens, 3, heads, dim // heads)
    q, k, v = (qkv[:, :, i, :, :].permute_dims(0, 2, 1, 3) for i in range(3))  # (B, H, N, D)
    return F.softmax((q * (dim // heads) ** -0.5) @ k.permute_dims(0, 1, 3, 2)), v


def block_tokens(model: VisionTransformer, images: Tensor | Array, layer: int) -> Tensor:
    """Tokens (B, N, D) after block `layer`, before any final norm. Raises IndexError for a block that is not there."""
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise IndexError(f"layer {layer} given, the model's blocks are 0 ... {depth - 1} (or -{depth} ... -1)")
    x = model.first_tokens(images)
    for block in model.blocks[: layer % depth + 1]:
        x = block(x)
    return x


def rollout(model: VisionTransformer, images: Tensor | Array) -> np.ndarray:
    """How much the output draws on each patch: attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928, section 3).

    With A the mean of a block's attention weights over its heads, the blocks' 0.5 A + 0.5 I are multiplied up; of the
    product, the rows of the tokens that the head reads (class and distillation tokens, or all patches) are averaged.

    Returns:
        (B, rows, columns) float64: shares of at least 0 that sum to 1 with those of the prefix tokens.
    """
    c = model.config
    product = None
    with no_grad(), nn.evaluating():
        for weights in _maps(model, images):
            mixed = 0.5 * weights.numpy().mean(axis=1, dtype=np.float64) + 0.5 * np.eye(weights.shape[-1])  # (B, N, N)
            product = mixed if product is None else mixed @ product
    read = slice(0, 1 + c.distilled) if c.global_pool == "token" else slice(c.num_prefix_tokens, None)
    shares = product[:, read].mean(axis=1)  # (B, N)
    return shares[:, c.num_prefix_tokens :].reshape(-1, *c.grid_size)


class FeaturesAndLogits(nn.Module):
    """A model whose output is its pooled feature and its logits side by side: (B, D + num_classes)."""

    def __init__(self, model: VisionTransformer) -> None:
        self.model, self.config = model, model.config

    def forward(self, images: Tensor | Array) -> Tensor:
        tokens = self.model.read_tokens(images)
        features = self.model.pool(tokens)
        if not self.model.config.num_classes:
            return features
        return concat([features, self.model.forward_head(tokens)], axis=1)
