"""The configuration of a Vision Transformer: all that it takes to build one."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyvit.files.fields import boolean, checked, integer, list_of, number, one_of, optional
from tinyvit.models import resnet

Size = int | tuple[int, int]


def _size(value: Any) -> tuple[int, int]:
    try:
        height, width = map(integer(1, 65536), value if isinstance(value, (tuple, list)) else (value, value))
    except ValueError:
        raise ValueError("expected a whole number from 1 to 65536, or two of them as (height, width)") from None
    return height, width


def _stages(value: Any) -> tuple[int, ...]:
    try:
        return list_of(integer(1, 100), 0, resnet.MOST_STAGES)(value)
    except ValueError:
        raise ValueError(f"expected at most {resnet.MOST_STAGES} numbers of blocks from 1 to 100, or None") from None


def _channels(value: Any) -> tuple[int, ...]:
    try:
        return list_of(integer(1, 65536), 0, 8)(value)
    except ValueError:
        raise ValueError("expected at most 8 numbers of channels from 1 to 65536, or None") from None


def _rate(value: Any) -> float:
    if number(0, 1)(value) == 1:
        raise ValueError("expected a number from 0 to 1 (1 excluded)")
    return float(value)


FIELDS = {  # the type and the range of each setting
    "image_size": _size,
    "patch_size": _size,
    "resnet_layers": optional(_stages),
    "conv_chans": optional(_channels),
    "trim_image": boolean,
    "in_chans": integer(1, 1024),
    "num_classes": integer(0, 1_000_000),
    "embed_dim": integer(1, 65536),
    "depth": integer(1, 1000),
    "num_heads": integer(1, 65536),
    "mlp_ratio": number(1e-6, 1e6),
    "qkv_bias": boolean,
    "class_token": boolean,
    "reg_tokens": integer(0, 65536),
    "distilled": boolean,
    "no_embed_class": boolean,
    "pos_embed": one_of("learn", "sincos2d", "none"),
    "rope": optional(one_of("eva", "dinov3", "pe", "axial", "mixed")),
    "rope_grid": optional(_size),
    "global_pool": one_of("token", "avg", "map", "seq"),
    "fc_norm": optional(boolean),
    "act": one_of("gelu", "gelu_tanh", "quick_gelu"),
    "swiglu": boolean,
    "norm": one_of("layer_norm", "rms_norm"),
    "norm_eps": number(0, 1),
    "init_values": optional(number(-1e6, 1e6)),
    **dict.fromkeys(
        ("embed_norm", "pre_norm", "final_norm", "proj_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm"), boolean
    ),
    "representation_size": optional(integer(1, 65536)),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "attn_drop_rate", "proj_drop_rate", "drop_path"), _rate),
}
MOST_PARAMETERS = 10**11  # 400 GB in float32

# What other libraries call a setting.
_OTHER_NAMES = {
    "img_size": "image_size",
    "drop_path_rate": "drop_path",
    "act_layer": "act",
    "dim": "embed_dim",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "heads": "num_heads",
    "num_attention_heads": "num_heads",
    "in_channels": "in_chans",
    "num_channels": "in_chans",
    "num_labels": "num_classes",
}


@dataclass(frozen=True)
class ViTConfig:
    """All that it takes to build a VisionTransformer.

    Attributes:
        image_size, patch_size: pixels, (height, width); one number n stands for (n, n).
        resnet_layers: blocks in each stage of a ResNet before the patches (at most 4), () for its stem alone, None for
            no ResNet. `patch_size` then counts pixels of its feature map, one for 4, 4, 8, 16 or 32 pixels of the
            image with 0, 1, 2, 3 or 4 stages, rounded up.
        conv_chans: channels between the convolutions that make tokens in place of patches, () for one convolution,
            None for patches. Each halves the image's sides, rounded up; `patch_size` is 1.
        trim_image: whether pixels below and right of the last whole patch are left out; an image size that the patch
            size does not divide is refused otherwise.
        in_chans: channels of an image.
        num_classes: outputs; 0 gives the feature before the head.
        embed_dim, depth, num_heads: width of a token, number of blocks, heads of each attention.
        mlp_ratio: width of an MLP's hidden layer over embed_dim.
        qkv_bias: whether queries, keys and values have biases.
        class_token: whether a learned token stands before the patches.
        reg_tokens: how many register tokens stand behind it (Darcet et al. 2023, arXiv:2309.16588).
        distilled: a distillation token and a second head (Touvron et al. 2020, arXiv:2012.12877).
        no_embed_class: position embeddings for the patches only.
        pos_embed: "learn", "sincos2d" for fixed sines and cosines (Chen et al. 2021, arXiv:2104.02057), or "none".
        rope: rotary positions, one of `parts.ROPES` ("eva", "dinov3", "pe", "axial" or "mixed"); None for none.
        rope_grid: the grid of patches that they were trained on, if places in another are scaled to it.
        global_pool: "token" takes the class token, "avg" the mean of the patches, "map" a learned attention to them
            (Zhai et al. 2021, arXiv:2106.04560), "seq" their mean with learned weights (Hassani et al. 2021).
        fc_norm: whether the last layer norm stands behind the pooling; None: if that is "avg", as in timm.
        act: "gelu" (exact), "gelu_tanh" or "quick_gelu" (that of OpenAI's CLIP).
        swiglu: gated MLPs, with SiLU in the place of `act` (Shazeer 2020, arXiv:2002.05202).
        norm, norm_eps: "layer_norm" or "rms_norm", and the epsilon of them all.
        embed_norm, pre_norm, final_norm: whether there is a norm in the patch embedding, one before the blocks (the
            patch embedding then has no bias, as in CLIP), and one behind them.
        proj_bias: whether attentions' projections and MLPs have biases.
        qk_norm, scale_attn_norm, scale_mlp_norm: norms of each head's queries and keys, of what comes before an
            attention's projection, and of an MLP's hidden layer.
        init_values: start value of layer scale, None for none.
        representation_size: width of a tanh layer before the head (pre_logits), None for none.
        drop_rate: dropout before the head; pos_drop_rate: after the position embeddings; proj_drop_rate: after each
            attention's projection and in each MLP; attn_drop_rate: of attention weights.
        drop_path: probability of dropping a residual branch of the last block, rising linearly from 0 in the first.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    resnet_layers: tuple[int, ...] | None = None
    conv_chans: tuple[int, ...] | None = None
    trim_image: bool = False
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
    rope: str | None = None
    rope_grid: tuple[int, int] | None = None
    global_pool: str = "token"
    fc_norm: bool | None = None
    act: str = "gelu"
    swiglu: bool = False
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    embed_norm: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False
    init_values: float | None = None
    representation_size: int | None = None
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        """Check each setting, then what they make together. Raises ValueError."""
        given = {name: _plain(value) for name, value in vars(self).items()}
        for name, value in checked(given, FIELDS).items():
            object.__setattr__(self, name, value)
        self._check_patches()
        self._check_head()
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if self.rope and self.embed_dim // self.num_heads % 4:
            raise ValueError(f"rope needs heads of a width divisible by 4, got {self.embed_dim // self.num_heads}")
        if self.pos_embed == "sincos2d" and self.embed_dim % 4:
            raise ValueError(f"sincos2d position embeddings need embed_dim divisible by 4, got {self.embed_dim}")
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} of embed_dim {self.embed_dim} leaves the MLP no hidden layer")
        if self.num_weights > MOST_PARAMETERS:
            raise ValueError(f"a model of {self.num_weights:.1e} parameters is refused, at most {MOST_PARAMETERS:.0e}")

    def _check_patches(self) -> None:
        if self.conv_chans is not None and (self.resnet_layers is not None or self.patch_size != (1, 1)):
            given = f"patch_size {self.patch_size} and resnet_layers {self.resnet_layers}"
            raise ValueError(
                f"conv_chans {self.conv_chans} makes the tokens: it needs patch_size 1 and no ResNet, got {given}"
            )
        (rows, columns), (h, w) = self.feature_size, self.patch_size
        if rows < h or columns < w or ((rows % h or columns % w) and not self.trim_image):
            image = f"image size {self.image_size[0]}x{self.image_size[1]}"
            if self.resnet_layers is not None:
                image += f" makes a feature map of {rows}x{columns}, which"
            raise ValueError(f"{image} is not divisible by patch size {h if h == w else f'{h}x{w}'}")

    def _check_head(self) -> None:
        if self.fc_norm and self.global_pool != "avg":
            raise ValueError(f'fc_norm=True needs global_pool="avg", got {self.global_pool!r}')
        if self.global_pool == "token" and not self.class_token:
            raise ValueError('global_pool "token" needs class_token=True; without one use global_pool="avg"')
        if self.distilled and self.global_pool != "token":
            raise ValueError(
                'a distilled model needs global_pool="token": its heads read the class and distillation tokens'
            )

    @property
    def num_weights(self) -> int:
        """The number of weights in the large matrices, outside a ResNet."""
        dim, (h, w) = self.embed_dim, self.patch_size
        blocks = self.depth * dim * (4 * dim + (2 + self.swiglu) * self.mlp_dim)
        blocks += 9 * sum(before * after for before, after in itertools.pairwise(self.tokenizer_chans))
        return blocks + dim * (
            self.num_tokens + self.feature_chans * h * w + self.num_classes + (self.representation_size or 0)
        )

    @property
    def tokenizer_chans(self) -> tuple[int, ...]:
        """Channels before, between and after the convolutions that make tokens; () where patches do."""
        return () if self.conv_chans is None else (self.in_chans, *self.conv_chans, self.embed_dim)

    @property
    def feature_size(self) -> tuple[int, int]:
        """Height and width of what is cut into patches: the image's, or those of the feature map."""
        stride = 1 if self.resnet_layers is None else resnet.stride(self.resnet_layers)
        if self.conv_chans is not None:
            stride = 2 ** (len(self.conv_chans) + 1)
        return -(-self.image_size[0] // stride), -(-self.image_size[1] // stride)  # rounded up

    @property
    def feature_chans(self) -> int:
        """Channels of what is cut into patches."""
        if self.conv_chans is not None:
            return self.embed_dim
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

    def replace(self, **changes: Any) -> ViTConfig:
        """A copy with other values.

        Args:
            changes: settings by name.

        Raises:
            TypeError: an unknown setting.
            ValueError: settings that do not fit together.
        """
        for name in changes:
            if name == "pretrained":
                raise TypeError("there is no setting 'pretrained': tinyvit.load_model(path) opens trained weights")
            if name not in FIELDS:
                close = difflib.get_close_matches(name, FIELDS, n=1)
                meant = _OTHER_NAMES.get(name) or (close[0] if close else None)
                hint = f"did you mean {meant}?" if meant else f"known are {', '.join(sorted(FIELDS))}"
                raise TypeError(f"unknown model setting {name!r}; {hint}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `ViTConfig(**d)` takes them back."""
        return dataclasses.asdict(self)


def _plain(value: Any) -> Any:
    """A value with Python's numbers in place of NumPy's, also within lists and tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value
