"""Looking inside a model: the weights of its attentions, and attention rollout.

The model's own forward pass runs, and each attention module that it calls says what its weights are: the module has a
method `attention_weights(x)`, (B, N, D) -> (B, heads, N, N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from tinyvit import nn
from tinyvit.engine.ops import concat, stack
from tinyvit.engine.tensor import Array, Tensor, no_grad
from tinyvit.kernels import jit
from tinyvit.models.config import ViTConfig


class Model(Protocol):
    """What is used here of a `VisionTransformer`."""

    config: ViTConfig
    blocks: list[nn.Module]
    head_dist: nn.Module | None

    def __call__(self, images: Tensor | Array, /) -> Tensor: ...
    def head_tokens(self, images: Tensor | Array) -> Tensor: ...
    def pool(self, x: Tensor) -> Tensor: ...
    def forward_head(self, x: Tensor) -> Tensor: ...


def attention_maps(model: Model, images: Tensor | Array) -> Tensor:
    """The softmax attention weights of every block, in evaluation mode and with nothing recorded.

    Args:
        model: its state stays as it is.
        images: (B, C, H, W), floating.

    Returns:
        (depth, B, num_heads, N, N) in the model's library and dtype. Row i of the last two axes says how much token i
        reads of each token (it sums to 1); the first `config.num_prefix_tokens` are class, distillation and register
        tokens, the others patches, row by row. It takes 4 * depth * B * num_heads * N^2 bytes.

    Raises:
        TypeError: an attention of the model does not define its weights.
    """
    maps: list[Tensor] = []
    visit_attention(model, images, maps.append)
    return stack(maps)


def visit_attention(model: Model, images: Tensor | Array, visit: Callable[[Tensor], object]) -> None:
    """Call `visit` with the weights (B, heads, N, N) of each attention, in the order in which the model runs them."""
    for number, block in enumerate(model.blocks):
        if not any(_weights(module) for module in block.modules()):
            raise TypeError(
                f"block {number} ({type(block).__name__}) has no attention whose weights are known: "
                "give its attention module a method attention_weights(x), (B, N, D) -> (B, heads, N, N)"
            )

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        weights = _weights(module)
        if weights is not None:
            visit(weights(args[0]))

    with no_grad(), nn.evaluating(), nn.forward_pre_hook(hook), jit.worth_it_for(images.shape[0]):
        model(images)


def _weights(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The module's method `attention_weights`, None if it has none.

    Raises:
        TypeError: a subclass has a `forward` of its own but inherits `attention_weights`, which need not fit it.
    """
    if not hasattr(module, "attention_weights"):
        return None
    for owner in (module, *type(module).__mro__):
        if "attention_weights" in vars(owner):
            break
        if "forward" in vars(owner):
            raise TypeError(
                f"{type(module).__name__} has a forward of its own but no attention_weights: define the method, "
                "or attention_weights = Attention.attention_weights if the weights are the same"
            )
    return module.attention_weights


def rollout(model: Model, images: Tensor | Array) -> np.ndarray:
    """How much the output draws on each patch: attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928, section 3).

    With A the mean of a block's attention weights over its heads, the blocks' 0.5 A + 0.5 I are multiplied. Of the
    product, the rows of the tokens that the head reads (class and distillation tokens, or all patches) are averaged.

    Args:
        model, images: as in `attention_maps`.

    Returns:
        (B, rows, columns) float64: shares of at least 0 that sum to 1 with those of the prefix tokens.
    """
    c = model.config
    product: np.ndarray | None = None

    def multiply(weights: Tensor) -> None:
        nonlocal product
        mixed = 0.5 * weights.numpy().mean(axis=1, dtype=np.float64) + 0.5 * np.eye(weights.shape[-1])  # (B, N, N)
        product = mixed if product is None else mixed @ product

    visit_attention(model, images, multiply)
    assert product is not None  # there is at least one block
    read = slice(0, 1 + c.distilled) if c.global_pool == "token" else slice(c.num_prefix_tokens, None)
    shares = product[:, read].mean(axis=1)  # (B, N)
    return shares[:, c.num_prefix_tokens :].reshape(-1, *c.grid_size)


class Features(nn.Module):
    """A model whose output is its pooled feature, and side by side with it what else is wanted: (B, D + …).

    Args:
        distilled: the distillation token (B, D) of a model that has two heads.
        logits: the logits (B, num_classes) of a model that has classes.
    """

    def __init__(self, model: Model, *, distilled: bool = False, logits: bool = False) -> None:
        self.model, self.config = model, model.config
        self.distilled, self.logits = distilled and model.head_dist is not None, logits and model.config.num_classes > 0

    def forward(self, images: Tensor | Array) -> Tensor:
        tokens = self.model.head_tokens(images)
        outputs = [self.model.pool(tokens)]
        if self.distilled:
            outputs.append(tokens[:, 1, :])
        if self.logits:
            outputs.append(self.model.forward_head(tokens))
        return concat(outputs, axis=1) if outputs[1:] else outputs[0]
