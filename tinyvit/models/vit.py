"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929), with the parameter names of timm's models."""

from __future__ import annotations

import numpy as np

from tinyvit import functional as F
from tinyvit import nn
from tinyvit.backend import arrays
from tinyvit.engine.ops import broadcast_to, concat, tanh
from tinyvit.engine.tensor import Array, Tensor
from tinyvit.models import inspection, resnet
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) -> patch tokens (B, N, D), of a hybrid through a ResNet's feature map."""

    def __init__(self, config: ViTConfig) -> None:
        layers = config.resnet_layers
        self.backbone = nn.Identity() if layers is None else resnet.backbone(config.in_chans, layers)
        self.proj = PatchProjection(config)

    def forward(self, images: Tensor) -> Tensor:
        return F.patch_embed(self.backbone(images), self.proj.weight, self.proj.bias)


class PatchProjection(nn.Module):
    """The weight (D, C, h, w) and bias (D,) of the patch embedding."""

    def __init__(self, config: ViTConfig) -> None:
        self.weight = nn.Parameter(nn.init.lecun_normal((config.embed_dim, config.feature_chans, *config.patch_size)))
        self.bias = nn.Parameter(np.zeros(config.embed_dim, np.float32))


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D), or -> (B, queries, D) for the first tokens alone."""

    def __init__(self, config: ViTConfig) -> None:
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.attn_drop_rate = config.attn_drop_rate
        # Queries, keys and values share one matrix but are initialised as three.
        self.qkv = nn.Linear(
            dim, 3 * dim, config.qkv_bias, weight_init=lambda shape: nn.init.xavier_uniform(shape, fan_out=dim)
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(config.proj_drop_rate)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        qkv = self.qkv(x)  # (B, N, 3 D)
        rate, training = self.attn_drop_rate, self.training
        y = F.qkv_attention(qkv, self.num_heads, dropout=rate, training=training, queries=queries)
        return self.proj_drop(self.proj(y))


class Mlp(nn.Module):
    """Two linear layers with a GELU between: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTConfig) -> None:
        self.approximate = "tanh" if config.act == "gelu_tanh" else "none"
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)
        for layer in (self.fc1, self.fc2):
            layer.bias.data = nn.init.normal(layer.bias.shape, std=1e-6)
        self.drop = nn.Dropout(config.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear_gelu(x, self.fc1.weight, self.fc1.bias, self.approximate)  # (B, N, mlp_dim)
        return self.drop(self.fc2(self.drop(x)))


class Block(nn.Module):
    """Attention, then an MLP, each normalised and added to the residual stream: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        def layer_scale() -> nn.Module:
            return nn.Identity() if config.init_values is None else nn.LayerScale(config.embed_dim, config.init_values)

        self.norm1 = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = layer_scale()
        self.norm2 = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = layer_scale()
        self.drop_path = nn.DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x


class VisionTransformer(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes), or features (B, D) if num_classes is 0.

    A loaded model has the names of its classes (`class_names`) and how images are prepared for it (`preprocessing`).
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
        if config.pos_embed == "learn":
            self.pos_embed = nn.Parameter(nn.init.normal((1, embedded, dim), std=0.02))
        else:
            self.pos_embed = nn.Parameter(sincos2d(config.grid_size, dim, embedded), requires_grad=False)
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        self.patch_embed = PatchEmbed(config)
        self.blocks = [Block(config, rate) for rate in np.linspace(0.0, config.drop_path, config.depth).tolist()]
        norm, after = nn.LayerNorm(dim, config.norm_eps), config.norm_after_pool
        self.norm = nn.Identity() if after else norm
        self.fc_norm = norm if after else nn.Identity()
        self.pre_logits = PreLogits(dim, config.representation_size) if config.representation_size else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = _head(config.representation_size or dim, config.num_classes)
        self.head_dist = _head(dim, config.num_classes) if config.distilled else None

    def forward(self, images: Tensor | Array) -> Tensor:
        return self.forward_head(self.read_tokens(images))

    def forward_features(self, images: Tensor | Array) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, prefix + patches, D), normalised unless `fc_norm` is to do it."""
        x = self.first_tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def read_tokens(self, images: Tensor | Array) -> Tensor:
        """The tokens of `forward_features` that the head reads: all, or the class token (and that of distillation)."""
        if self.config.global_pool != "token":
            return self.forward_features(images)
        x = self.first_tokens(images)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.norm(_first_outputs(last, x, queries=1 + self.config.distilled))

    def features(self, images: Tensor | Array, layer: int | None = None) -> Tensor:
        """Images (B, C, H, W) -> the pooled feature before the head, (B, D) (what `num_classes=0` gives).

        With `layer`: the tokens (B, prefix + patches, D) after that block, before any final norm; negative numbers
        count from the end. Raises IndexError for a block that is not there.
        """
        if layer is None:
            return self.pool(self.read_tokens(images))
        return inspection.block_tokens(self, images, layer)

    def attention_maps(self, images: Tensor | Array) -> Tensor:
        """Images (B, C, H, W) -> softmax attention weights (depth, B, num_heads, N, N); see `inspection`."""
        return inspection.attention_maps(self, images)

    def first_tokens(self, images: Tensor | Array) -> Tensor:
        """Images (B, C, H, W) -> the first block's input (B, prefix + patches, D)."""
        return self.embed(self.patch_embed(self._images(images)))

    def embed(self, x: Tensor) -> Tensor:
        """Patch tokens (B, N, D) -> (B, prefix + N, D): prefix tokens in front, position embeddings added."""
        tokens = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        prefix = [broadcast_to(t, (x.shape[0], *t.shape[1:])) for t in tokens]
        if self.config.no_embed_class:
            x = concat([*prefix, x + self.pos_embed], axis=1)
        else:
            x = concat([*prefix, x], axis=1) + self.pos_embed
        return self.pos_drop(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, prefix + patches, D) -> logits (B, num_classes); the mean of a distilled model's two heads."""
        return self.classify(self.pool(x), None if self.head_dist is None else x[:, 1, :])

    def classify(self, pooled: Tensor, distilled: Tensor | None = None) -> Tensor:
        """The feature of `pool` (B, D) and a distilled model's distillation token (B, D) -> logits (B, num_classes)."""
        logits = self.head(self.head_drop(pooled))
        if distilled is None or self.config.num_classes == 0:
            return logits
        return (logits + self.head_dist(self.head_drop(distilled))) * 0.5

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, prefix + patches, D) -> the feature before the head, (B, D) or (B, representation_size)."""
        if self.config.global_pool == "avg":
            pooled = x[:, self.config.num_prefix_tokens :, :].mean(axis=1)
        else:
            pooled = x[:, 0, :]
        return self.pre_logits(self.fc_norm(pooled))

    def _images(self, images: Tensor | Array) -> Tensor:
        """The images as a Tensor in the model's library and dtype."""
        like = self.patch_embed.proj.weight.data
        data = images.data if isinstance(images, Tensor) else images
        if not arrays.is_array(data):
            raise TypeError(f"expected an array of images (B, C, H, W), got {type(data).__name__}")
        expected = (self.config.in_chans, *self.config.image_size)
        if tuple(data.shape[1:]) != expected:
            raise ValueError(f"expected images (B, {', '.join(map(str, expected))}), got {tuple(data.shape)}")
        if not arrays.is_floating(data):
            raise TypeError(f"expected floating images, scaled and normalised, got {data.dtype}")
        if isinstance(images, Tensor) and images.requires_grad:
            return images if images.dtype == like.dtype else images.astype(like.dtype)
        return Tensor(arrays.astype(arrays.convert(data, like), like.dtype))


# The layers that compute each token's output from that token alone, and those that are made of them and of attention.
_KNOWN_LAYERS = {Block, Attention, Mlp, nn.Linear, nn.LayerNorm, nn.LayerScale, nn.Dropout, nn.DropPath, nn.Identity}


def _first_outputs(block: nn.Module, x: Tensor, queries: int) -> Tensor:
    """The first `queries` tokens of block(x): (B, N, D) -> (B, queries, D).

    A block of the layers above needs the other tokens only as keys and values, so nothing more is computed for them.
    Any other block runs as it is.
    """
    if any(type(layer) not in _KNOWN_LAYERS for _, layer in block.named_modules()):
        return block(x)[:, :queries, :]
    x = x[:, :queries, :] + block.drop_path(block.ls1(block.attn(block.norm1(x), queries)))
    return x + block.drop_path(block.ls2(block.mlp(block.norm2(x))))


class PreLogits(nn.Module):
    """The tanh layer before the head of models pre-trained on ImageNet-21k: (B, D) -> (B, representation_size)."""

    def __init__(self, dim: int, representation_size: int) -> None:
        self.fc = nn.Linear(dim, representation_size)

    def forward(self, x: Tensor) -> Tensor:
        return tanh(self.fc(x))


def _head(dim: int, num_classes: int) -> nn.Module:
    """A classifier of zeros, as in the paper (appendix B.1.1)."""
    return nn.Linear(dim, num_classes, weight_init=lambda s: np.zeros(s, np.float32)) if num_classes else nn.Identity()


def sincos2d(grid_size: tuple[int, int], dim: int, length: int, temperature: float = 10_000.0) -> np.ndarray:
    """Sines and cosines of a patch's column and row: (1, length, dim).

    They have dim / 4 frequencies from 1 to 1 / temperature (Chen et al. 2021, arXiv:2104.02057, in the form of Beyer et
    al. 2022, arXiv:2205.01580). Rows before the patches' (prefix tokens) are zeros.
    """
    y, x = np.mgrid[: grid_size[0], : grid_size[1]].reshape(2, -1, 1)
    omega = temperature ** -(np.arange(dim // 4) / max(dim // 4 - 1, 1))
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    prefix = np.zeros((length - len(table), dim))
    return np.concatenate([prefix, table])[None].astype(np.float32)
