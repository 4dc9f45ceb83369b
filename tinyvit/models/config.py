"""The configuration of a Vision Transformer: all that it takes to build one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyvit.models import resnet

Size = int | tuple[int, int]


@dataclass(frozen=True)
class ViTConfig:
    """All that it takes to build a VisionTransformer.

    Attributes:
        image_size, patch_size: pixels, one number or (height, width); kept as pairs.
        resnet_layers: blocks in each stage of a ResNet before the patches (at most 4), () for its stem alone, None for
            no ResNet. `patch_size` then counts pixels of its feature map, one for 4, 4, 8, 16 or 32 pixels of the
            image with 0, 1, 2, 3 or 4 stages, rounded up.
        in_chans: channels of an image.
        num_classes: outputs; 0 gives the feature before the head.
        embed_dim, depth, num_heads: width of a token, number of blocks, heads of each attention.
        mlp_ratio: width of an MLP's hidden layer over embed_dim.
        qkv_bias: whether queries, keys and values have biases.
        class_token: whether a learned token stands before the patches.
        reg_tokens: how many register tokens stand behind it (Darcet et al. 2023, arXiv:2309.16588).
        distilled: a distillation token and a second head (Touvron et al. 2020, arXiv:2012.12877).
        no_embed_class: position embeddings for the patches only.
        pos_embed: "learn", or "sincos2d" for fixed sines and cosines (Chen et al. 2021, arXiv:2104.02057).
        global_pool: "token" takes the class token, "avg" the mean of the patches.
        fc_norm: whether the last layer norm stands behind the pooling; None: if that is "avg", as in timm.
        act: "gelu" (exact) or "gelu_tanh".
        norm_eps: epsilon of all layer norms.
        init_values: start value of layer scale, None for none.
        representation_size: width of a tanh layer before the head (pre_logits), None for none.
        drop_rate: dropout before the head; pos_drop_rate: after the position embeddings; proj_drop_rate: after each
            attention's projection and in each MLP; attn_drop_rate: of attention weights.
        drop_path: probability of dropping a residual branch of the last block, rising linearly from 0 in the first.
    """

    image_size: Size = 224
    patch_size: Size = 16
    resnet_layers: tuple[int, ...] | None = None
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    class_token: bool = True
    reg_tokens: int = 0
    distilled: bool = False
    no_embed_class: bool = False
    pos_embed: str = "learn"
    global_pool: str = "token"
    fc_norm: bool | None = None
    act: str = "gelu"
    norm_eps: float = 1e-6
    init_values: float | None = None
    representation_size: int | None = None
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        (height, width), (h, w) = self.image_size, self.patch_size
        least = {"in_chans": 1, "embed_dim": 1, "depth": 1, "num_heads": 1, "num_classes": 0, "reg_tokens": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
            object.__setattr__(self, name, int(value))  # JSON does not know NumPy's
        if self.representation_size is not None and self.representation_size < 1:
            size = self.representation_size
            raise ValueError(f"representation_size must be at least 1, or None for none, got {size}")
        if self.resnet_layers is not None:
            object.__setattr__(self, "resnet_layers", _stages(self.resnet_layers))
        if self.fc_norm and self.global_pool != "avg":
            raise ValueError(f'fc_norm=True needs global_pool="avg", got {self.global_pool!r}')
        if min(height, width, h, w) < 1:
            raise ValueError(f"image_size and patch_size must be positive, got {height}x{width} and {h}x{w}")
        rows, columns = self.feature_size
        if rows % h or columns % w:
            image, patch = f"image size {height}x{width}", f"patch size {h if h == w else f'{h}x{w}'}"
            if self.resnet_layers is not None:
                image += f" makes a feature map of {rows}x{columns}, which"
            raise ValueError(f"{image} is not divisible by {patch}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        kinds = {"pos_embed": ("learn", "sincos2d"), "global_pool": ("token", "avg"), "act": ("gelu", "gelu_tanh")}
        for name, choices in kinds.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError('global_pool "token" needs class_token=True; without one use global_pool="avg"')
        if self.distilled and self.global_pool != "token":
            raise ValueError(
                'a distilled model needs global_pool="token": its heads read the class and distillation tokens'
            )
        if self.pos_embed == "sincos2d" and self.embed_dim % 4:
            raise ValueError(f"sincos2d position embeddings need embed_dim divisible by 4, got {self.embed_dim}")
        for name in ("drop_rate", "pos_drop_rate", "attn_drop_rate", "proj_drop_rate", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in 0 ... 1 (1 excluded), got {getattr(self, name)}")
        if not self.mlp_ratio > 0 or self.mlp_dim < 1:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")

    @property
    def feature_size(self) -> tuple[int, int]:
        """Height and width of what is cut into patches: the image's, or those of the ResNet's feature map."""
        stride = 1 if self.resnet_layers is None else resnet.stride(self.resnet_layers)
        return -(-self.image_size[0] // stride), -(-self.image_size[1] // stride)  # rounded up

    @property
    def feature_chans(self) -> int:
        """Channels of what is cut into patches."""
        return self.in_chans if self.resnet_layers is None else resnet.channels(self.resnet_layers)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (rows, columns), (h, w) = self.feature_size, self.patch_size
        return rows // h, columns // w

    @property
    def norm_after_pool(self) -> bool:
        """Whether the last layer norm is `fc_norm`, behind the pooling, and not `norm`, before it."""
        return self.global_pool == "avg" if self.fc_norm is None else self.fc_norm

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class, distillation and register tokens."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    def replace(self, **changes: object) -> ViTConfig:
        """A copy with other values.

        Raises:
            TypeError: an unknown field.
        """
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise TypeError(f"unknown model setting {name!r}; known are {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON; `ViTConfig(**d)` takes them back."""
        return dataclasses.asdict(self)


def _pair(name: str, size: Size) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, (int, np.integer)) for n in pair):
        raise ValueError(f"{name} must be a whole number or a pair (height, width), got {size!r}")
    return int(pair[0]), int(pair[1])


def _stages(layers: Sequence[int]) -> tuple[int, ...]:
    known = isinstance(layers, (tuple, list)) and len(layers) <= resnet.MOST_STAGES
    if not known or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in layers):
        raise ValueError(f"resnet_layers must be up to {resnet.MOST_STAGES} numbers of blocks, or None, got {layers!r}")
    return tuple(map(int, layers))
