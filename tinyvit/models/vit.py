"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929), with the parameter names of timm's models.

In the shapes B is the number of images, N that of tokens (prefix tokens, then patches, row by row), and D the width of
a token (`embed_dim`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyvit import functional as F
from tinyvit import nn
from tinyvit.backend import arrays
from tinyvit.engine.ops import broadcast_to, concat, tanh
from tinyvit.engine.tensor import Array, Tensor, array_of
from tinyvit.models import inspection, parts, resnet
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing


class PatchEmbed(nn.Module):
    """Images -> one token for each patch; in a hybrid the patches are those of a ResNet's feature map."""

    def __init__(self, config: ViTConfig) -> None:
        layers, patch = config.resnet_layers, config.patch_size
        self.backbone = nn.Identity() if layers is None else resnet.backbone(config.in_chans, layers)
        self.proj = nn.Conv2d(config.feature_chans, config.embed_dim, patch, stride=patch, bias=not config.pre_norm)
        self.norm = parts.norm_if(config.embed_norm, config, config.embed_dim)
        (rows, columns), (h, w) = config.grid_size, patch
        self.whole = (..., slice(rows * h), slice(columns * w)) if config.trim_image else None

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W)
        x = self.backbone(images)
        x = x if self.whole is None else x[self.whole]
        if nn.is_plain(self.proj, nn.Conv2d):  # no pixel is in two patches: one product of matrices
            x = F.patch_embed(x, self.proj.weight, self.proj.bias)  # (B, patches, D)
        else:
            x = self.proj(x)  # (B, D, rows, columns)
            x = x.reshape(*x.shape[:2], -1).transpose()
        return self.norm(x)  # (B, patches, D)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig) -> None:
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.attn_drop_rate = config.attn_drop_rate
        # Queries, keys and values share one matrix, but each has the initial values of a matrix of its own.
        self.qkv = nn.Linear(
            dim, 3 * dim, config.qkv_bias, weight_init=lambda shape: nn.init.xavier_uniform(shape, fan_out=dim)
        )
        self.q_norm, self.k_norm = (parts.norm_if(config.qk_norm, config, dim // config.num_heads) for _ in range(2))
        self.rope = parts.Rotary(config) if config.rope else None
        self.changes_queries = config.qk_norm or bool(config.rope)
        self.norm = parts.norm_if(config.scale_attn_norm, config, dim)
        self.proj = nn.Linear(dim, dim, config.proj_bias)
        self.proj_drop = nn.Dropout(config.proj_drop_rate)

    def forward(self, x: Tensor, queries: int | None = None, residual: Tensor | None = None) -> Tensor:  # (B, N, D)
        """The outputs of all tokens, or of the first `queries` alone, added to `residual` where there is one."""
        qkv, drop = self.queries_keys_values(x), self.attn_drop_rate  # (B, N, 3 D)
        y = F.qkv_attention(qkv, self.num_heads, dropout=drop, training=self.training, queries=queries)
        return nn.add_linear(residual, self.proj, self.norm(y), self.proj_drop)  # (B, N or queries, D)

    def queries_keys_values(self, x: Tensor) -> Tensor:  # (B, N, D)
        qkv = self.qkv(x)
        if not self.changes_queries:
            return qkv  # (B, N, 3 D)

        def change(q: Tensor, k: Tensor) -> Sequence[Tensor]:
            q, k = self.q_norm(q), self.k_norm(k)
            return (q, k) if self.rope is None else self.rope(q, k)

        return parts.with_queries_and_keys(qkv, self.num_heads, change)  # (B, N, 3 D)

    def attention_weights(self, x: Tensor) -> Tensor:  # (B, N, D)
        """The weights by which `forward` adds up the values in evaluation mode: softmax(q k^T / sqrt(D / heads))."""
        return F.attention_weights(self.queries_keys_values(x), self.num_heads)  # (B, heads, N, N)


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, config: ViTConfig) -> None:
        self.act, self.approximate = config.act, "tanh" if config.act == "gelu_tanh" else "none"
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim, config.proj_bias)
        self.norm = parts.norm_if(config.scale_mlp_norm, config, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim, config.proj_bias)
        for layer in (self.fc1, self.fc2) if config.proj_bias else ():
            layer.bias = nn.Parameter(nn.init.normal((layer.weight.shape[0],), std=1e-6))
        self.drop = nn.Dropout(config.proj_drop_rate)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # (B, N, D)
        """The outputs, added to `residual` where there is one."""
        fc1, fc2 = self.fc1, self.fc2
        layers_alone = nn.is_idle(self.norm) and nn.is_idle(self.drop) and self.act != "quick_gelu"
        if layers_alone and all(nn.is_plain(fc, nn.Linear) and fc.bias is not None for fc in (fc1, fc2)):
            return F.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.approximate, residual)
        if self.act == "quick_gelu":
            x = F.silu(self.fc1(x), parts.QUICK_GELU)  # (B, N, mlp_dim)
        else:
            x = nn.linear_gelu(self.fc1, x, self.approximate)  # (B, N, mlp_dim)
        return nn.add_linear(residual, self.fc2, self.norm(self.drop(x)), self.drop)  # (B, N, D)


class Block(nn.Module):
    """Attention, then an MLP; each reads the normalised tokens and adds to them."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        def layer_scale() -> nn.Module:
            return nn.Identity() if config.init_values is None else nn.LayerScale(config.embed_dim, config.init_values)

        self.norm1 = parts.norm(config, config.embed_dim)
        self.attn = Attention(config)
        self.ls1 = layer_scale()
        self.norm2 = parts.norm(config, config.embed_dim)
        self.mlp = parts.SwiGLU(config) if config.swiglu else Mlp(config)
        self.ls2 = layer_scale()
        self.drop_path = nn.DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        if nn.only_output_counts() and self._is_usual():
            return self._in_one_operation(x)
        x = self._add(x, self.attn, self.norm1(x), self.ls1)
        x = self._add(x, self.mlp, self.norm2(x), self.ls2)
        return x  # (B, N, D)

    def _is_usual(self) -> bool:
        """Whether `functional.encoder_block` computes what the layers would: none is a user's own or needs more."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        if (type(self), type(attn), type(mlp)) != (Block, Attention, Mlp):
            return False
        linear, idle = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), (self.ls1, self.ls2, attn.norm, mlp.norm)
        dropouts = (attn.proj_drop, mlp.drop, self.drop_path)
        layers = (self, attn, mlp, self.norm1, self.norm2, *linear, *idle, *dropouts)
        return (
            [_methods(type(layer)) for layer in layers] == _USUAL_LAYERS
            and _other_functions() == _USUAL_FUNCTIONS
            and all(vars(layer).keys().isdisjoint(_OVERRIDABLE) for layer in layers)
            and not any(layer.p and layer.training for layer in dropouts)
            and not (attn.changes_queries or (attn.training and attn.attn_drop_rate) or mlp.act == "quick_gelu")
            and all(layer.bias is not None for layer in linear)
            and attn.qkv.weight.shape[0] == 3 * attn.proj.weight.shape[1] == 3 * attn.proj.weight.shape[0]
        )

    def _in_one_operation(self, x: Tensor) -> Tensor:  # (B, N, D)
        block: Any = self
        attn, mlp, eps = block.attn, block.mlp, (block.norm1.eps, block.norm2.eps)
        layers = (block.norm1, attn.qkv, attn.proj, block.norm2, mlp.fc1, mlp.fc2)
        weights = [w for layer in layers for w in (layer.weight, layer.bias)]
        return F.encoder_block(x, *weights, num_heads=attn.num_heads, eps=eps, approximate=mlp.approximate)

    def _add(self, x: Tensor, branch: nn.Module, normal: Tensor, scale: nn.Module) -> Tensor:  # (B, N, D)
        """x + drop_path(scale(branch(normal))); where nothing is between, the branch adds x while it has the result."""
        if nn.is_plain(branch, Attention, Mlp) and nn.is_idle(scale) and nn.is_idle(self.drop_path):
            return branch(normal, residual=x)
        return nn.add_drop_path(x, self.drop_path, scale(branch(normal)))


def _methods(kind: type[nn.Module]) -> tuple[Any, ...]:
    return kind, kind.forward, kind.__call__


def _other_functions() -> tuple[Any, ...]:
    functions = (F.layer_norm, F.linear, F.mlp, F.add_linear, F.qkv_attention)
    return (Block._add, Attention.queries_keys_values, *functions)


# What a usual block is made of, as it was when this file was read: a user may replace methods and functions, too.
_USUAL_LAYERS = [
    _methods(kind)
    for kind in (
        Block, Attention, Mlp, *2 * (nn.LayerNorm,), *4 * (nn.Linear,), *4 * (nn.Identity,), *2 * (nn.Dropout,),
        nn.DropPath,
    )
]  # fmt: skip
_USUAL_FUNCTIONS = _other_functions()
_OVERRIDABLE = ("forward", "_add", "queries_keys_values")


class VisionTransformer(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes), or features (B, D) if num_classes is 0.

    Attributes:
        config: what rebuilds the model.
        class_names: of a loaded model, the names of its outputs.
        preprocessing: of a loaded model, how images are prepared for it.
    """

    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __init__(self, config: ViTConfig) -> None:
        self.config = config
        dim = config.embed_dim
        embedded = config.num_patches + (0 if config.no_embed_class else config.num_prefix_tokens)
        self.cls_token = nn.Parameter(np.zeros((1, 1, dim), np.float32)) if config.class_token else None
        self.dist_token = nn.Parameter(np.zeros((1, 1, dim), np.float32)) if config.distilled else None
        self.reg_token = nn.Parameter(nn.init.normal((1, config.reg_tokens, dim), 1e-6)) if config.reg_tokens else None
        self.pos_embed: nn.Parameter | None = None
        if config.pos_embed == "learn":
            self.pos_embed = nn.Parameter(nn.init.normal((1, embedded, dim), std=0.02))
        elif config.pos_embed == "sincos2d":
            self.pos_embed = nn.Parameter(parts.sincos2d(config.grid_size, dim, embedded), requires_grad=False)
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        chans = config.tokenizer_chans
        self.patch_embed: Any = parts.ConvTokenizer(chans) if chans else PatchEmbed(config)
        self.norm_pre = parts.norm_if(config.pre_norm, config, dim)
        rates = np.linspace(0.0, config.drop_path, config.depth).tolist()
        self.blocks: list[nn.Module] = [Block(config, rate) for rate in rates]
        norm, after = parts.norm_if(config.final_norm, config, dim), config.norm_after_pool
        self.norm: nn.Module = nn.Identity() if after else norm
        self.fc_norm: nn.Module = norm if after else nn.Identity()
        self.attn_pool = parts.AttentionPool(config, Mlp(config)) if config.global_pool == "map" else None
        self.seq_pool = parts.SequencePool(dim) if config.global_pool == "seq" else None
        self.pre_logits = PreLogits(dim, config.representation_size) if config.representation_size else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head, self.head_dist = _heads(config)

    def forward(self, images: Tensor | Array) -> Tensor:  # (B, C, H, W)
        return self.forward_head(self.head_tokens(images))  # (B, num_classes)

    def forward_features(self, images: Tensor | Array) -> Tensor:  # (B, C, H, W)
        """The tokens after the last block, normalised unless `fc_norm` does that after the pooling."""
        return self.norm(self._run(self.blocks, self.embed(images)))  # (B, N, D)

    def head_tokens(self, images: Tensor | Array) -> Tensor:  # (B, C, H, W)
        """The first tokens of `forward_features`, as many as the head reads: all unless `global_pool` is "token"."""
        if not _reads_first_tokens(self):
            return self.forward_features(images)  # (B, N, D)
        *blocks, last = self.blocks
        x = self._run(blocks, self.embed(images))
        return self.norm(_first_outputs(last, x, queries=1 + self.config.distilled))  # (B, 1 or 2, D)

    def embed(self, images: Tensor | Array) -> Tensor:  # (B, C, H, W)
        """The first block's input: prefix tokens and patches with their position embeddings."""
        x = self.patch_embed(self._images(images))  # (B, patches, D)
        tokens = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        prefix = [broadcast_to(t, (x.shape[0], *t.shape[1:])) for t in tokens]
        if self.pos_embed is not None and self.config.no_embed_class:
            x = concat([*prefix, x + self.pos_embed], axis=1)
        else:
            x = concat([*prefix, x], axis=1)
            x = x if self.pos_embed is None else x + self.pos_embed
        return self.norm_pre(self.pos_drop(x))  # (B, N, D)

    def forward_head(self, x: Tensor) -> Tensor:  # (B, N, D), or as many first tokens as the head reads
        """Logits; those of a distilled model are the mean of its two heads'."""
        return self.classify(self.pool(x), None if self.head_dist is None else x[:, 1, :])  # (B, num_classes)

    def pool(self, x: Tensor) -> Tensor:  # (B, N, D), or as many first tokens as the head reads
        """The feature before the head."""
        patches = slice(self.config.num_prefix_tokens, None)
        if self.attn_pool is not None:
            pooled = self.attn_pool(x[:, patches, :])
        elif self.seq_pool is not None:
            pooled = self.seq_pool(x[:, patches, :])
        elif self.config.global_pool == "avg":
            pooled = x[:, patches, :].mean(axis=1)
        else:
            pooled = x[:, 0, :]
        return self.pre_logits(self.fc_norm(pooled))  # (B, D) or (B, representation_size)

    def classify(self, pooled: Tensor, distilled: Tensor | None = None) -> Tensor:
        """The feature of `pool` and a distilled model's distillation token (B, D) -> logits (B, num_classes)."""
        logits = self.head(self.head_drop(pooled))
        if distilled is None or self.head_dist is None:
            return logits
        return (logits + self.head_dist(self.head_drop(distilled))) * 0.5

    def features(self, images: Tensor | Array, layer: int | None = None) -> Tensor:  # (B, C, H, W)
        """The pooled feature before the head (what `num_classes=0` gives), or the tokens after a block.

        Args:
            images: (B, C, H, W), floating.
            layer: the number of a block; negative numbers count from the end. None for the pooled feature.

        Returns:
            (B, D) or (B, representation_size); with `layer` (B, N, D), before any final norm.

        Raises:
            IndexError: no block has this number.
        """
        if layer is None:
            return self.pool(self.head_tokens(images))
        depth = len(self.blocks)
        if not -depth <= layer < depth:
            raise IndexError(f"layer {layer} given, the model's blocks are 0 ... {depth - 1} (or -{depth} ... -1)")
        return self._run(self.blocks[: layer % depth + 1], self.embed(images))

    attention_maps = inspection.attention_maps  # images (B, C, H, W) -> (depth, B, heads, N, N)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new head of zeros, for other classes; its config follows.

        Args:
            num_classes: 0 for no head.
            global_pool: "token", "avg" or "seq" changes how tokens are pooled; the weights of the last norm stay.

        Raises:
            ValueError: a `global_pool` of "map", for a model that has none.
        """
        pool = global_pool or self.config.global_pool
        if pool == "map" != self.config.global_pool:
            raise ValueError(
                'a model without attention pooling cannot get global_pool "map", expected "token" or "avg"'
            )
        self.attn_pool = self.attn_pool if pool == "map" else None
        after = self.config.norm_after_pool if pool == "avg" else None
        config = self.config.replace(num_classes=num_classes, global_pool=pool, fc_norm=after)
        if config.norm_after_pool != self.config.norm_after_pool:
            self.norm, self.fc_norm = self.fc_norm, self.norm
        self.config, self.class_names = config, ()
        self.head, self.head_dist = _heads(config)
        if (pool == "seq") != (self.seq_pool is not None):
            self.seq_pool = parts.SequencePool(config.embed_dim) if pool == "seq" else None
        like = self._like
        for head in (self.head, self.head_dist, self.seq_pool):
            if head is not None:
                head.to(arrays.device_name(like), like.dtype)

    def _run(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        """The tokens x after these blocks, one after the other."""
        for block in blocks:
            x = block(x)
        return x

    @property
    def _like(self) -> Array:
        """An array of the model's library, device and dtype."""
        return (self.patch_embed.parameters()[0] if self.pos_embed is None else self.pos_embed).data

    def _images(self, images: Tensor | Array) -> Tensor:
        """The images as a Tensor in the model's library and dtype. Raises TypeError or ValueError."""
        like = self._like
        data = array_of(images)
        if not arrays.is_array(data):
            raise TypeError(f"expected an array of images (B, C, H, W), got {type(data).__name__}")
        expected, shape = (self.config.in_chans, *self.config.image_size), tuple(data.shape)
        if shape[1:] != expected:
            cure = "; pass one image as images[None]" if shape == expected else ""
            given = ("B", *shape[1:]) if len(shape) == 4 else shape  # this may be a part of the caller's batch
            wanted, got = (f"({', '.join(map(str, sides))})" for sides in (("B", *expected), given))
            raise ValueError(f"expected images {wanted}, got {got}{cure}")
        if not arrays.is_floating(data):
            raise TypeError(f"expected floating images, scaled and normalised, got {data.dtype}")
        if isinstance(images, Tensor) and images.requires_grad:
            return images if images.dtype == like.dtype else images.astype(like.dtype)
        return Tensor(arrays.astype(arrays.convert(data, like), like.dtype))


class PreLogits(nn.Module):
    """The tanh layer before the head of models pre-trained on ImageNet-21k."""

    def __init__(self, dim: int, representation_size: int) -> None:
        self.fc = nn.Linear(dim, representation_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, D)
        return tanh(self.fc(x))  # (B, representation_size)


def _heads(config: ViTConfig) -> tuple[nn.Module, nn.Module | None]:
    """The classifier, of zeros as in the paper (appendix B.1.1), and that of a distilled model's second token."""

    def head(dim: int) -> nn.Module:
        if not config.num_classes:
            return nn.Identity()
        return nn.Linear(dim, config.num_classes, weight_init=lambda shape: np.zeros(shape, np.float32))

    first = head(config.representation_size or config.embed_dim)
    return first, head(config.embed_dim) if config.distilled and config.num_classes else None


# In a block that is made of these, attention alone lets one token's output depend on the others.
_KNOWN_LAYERS = (
    Block, Attention, Mlp, nn.Linear, nn.LayerNorm, nn.LayerScale, nn.Dropout, nn.DropPath, nn.Identity,
    nn.RMSNorm, parts.SwiGLU, parts.Rotary,
)  # fmt: skip


def _reads_first_tokens(model: VisionTransformer) -> bool:
    """Whether the output depends on the last block's first tokens alone; not where a user's own norm or method runs."""
    methods = ("forward_features", "forward_head", "pool")
    plain = all(getattr(type(model), name) is getattr(VisionTransformer, name) for name in methods)
    plain = plain and nn.is_plain(model.norm, *_KNOWN_LAYERS) and vars(model).keys().isdisjoint(methods)
    return model.config.global_pool == "token" and plain


def _first_outputs(block: nn.Module, x: Tensor, queries: int) -> Tensor:  # (B, N, D)
    """The first `queries` tokens of block(x).

    A block of known layers uses the other tokens as keys and values only, so nothing else is computed for them. Any
    other block, such as a user's own or one with a user's norm or attention, runs as it is.
    """
    if not (isinstance(block, Block) and _is_plain(block)):
        return block(x)[:, :queries, :]
    x = x[:, :queries, :] + block.drop_path(block.ls1(block.attn(block.norm1(x), queries)))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))  # (B, queries, D)


def _is_plain(block: Block) -> bool:
    """Whether a block, and all layers in it, in its attention and in its MLP, are known ones."""
    parts = (block, block.attn, block.mlp)
    layers = (layer for part in parts for layer in vars(part).values() if isinstance(layer, nn.Module))
    return all(nn.is_plain(layer, *_KNOWN_LAYERS) for layer in (block, *layers))
