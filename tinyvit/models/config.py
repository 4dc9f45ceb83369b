"""The configuration of a Vision Transformer: all that it takes to build one."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyvit.files.fields import Check, boolean, checked, integer, list_of, number, one_of, optional
from tinyvit.files.text import nearest
from tinyvit.models import resnet

Size = int | tuple[int, int]


def _size(value: Any) -> tuple[int, int]:
    try:
        height, width = map(integer(1, 65536), value if isinstance(value, (tuple, list)) else (value, value))
    except ValueError:
        raise ValueError("expected a whole number from 1 to 65536, or two of them as (height, width)") from None
    return height, width


def _numbers(of: str, highest: int, most: int) -> Check:
    """At most `most` whole numbers from 1 to `highest`, or None; `of` says what they count."""

    def check(value: Any) -> tuple[int, ...] | None:
        try:
            return optional(list_of(integer(1, highest), 0, most))(value)
        except ValueError:
            raise ValueError(f"expected at most {most} numbers of {of} from 1 to {highest}, or None") from None

    return check


def _rate(value: Any) -> float:
    if number(0, 1)(value) == 1:
        raise ValueError("expected a number from 0 to 1 (1 excluded)")
    return float(value)


def _setting(default: Any, check: Check) -> Any:
    """A field of ViTConfig with its default, and its type and range."""
    return dataclasses.field(default=default, metadata={"check": check})


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

    image_size: tuple[int, int] = _setting((224, 224), _size)
    patch_size: tuple[int, int] = _setting((16, 16), _size)
    resnet_layers: tuple[int, ...] | None = _setting(None, _numbers("blocks", 100, resnet.MOST_STAGES))
    conv_chans: tuple[int, ...] | None = _setting(None, _numbers("channels", 65536, 8))
    trim_image: bool = _setting(False, boolean)
    in_chans: int = _setting(3, integer(1, 1024))
    num_classes: int = _setting(1000, integer(0, 1_000_000))
    embed_dim: int = _setting(768, integer(1, 65536))
    depth: int = _setting(12, integer(1, 1000))
    num_heads: int = _setting(12, integer(1, 65536))
    mlp_ratio: float = _setting(4.0, number(1e-6, 1e6))
    qkv_bias: bool = _setting(True, boolean)
    class_token: bool = _setting(True, boolean)
    reg_tokens: int = _setting(0, integer(0, 65536))
    distilled: bool = _setting(False, boolean)
    no_embed_class: bool = _setting(False, boolean)
    pos_embed: str = _setting("learn", one_of("learn", "sincos2d", "none"))
    rope: str | None = _setting(None, optional(one_of("eva", "dinov3", "pe", "axial", "mixed")))
    rope_grid: tuple[int, int] | None = _setting(None, optional(_size))
    global_pool: str = _setting("token", one_of("token", "avg", "map", "seq"))
    fc_norm: bool | None = _setting(None, optional(boolean))
    act: str = _setting("gelu", one_of("gelu", "gelu_tanh", "quick_gelu"))
    swiglu: bool = _setting(False, boolean)
    norm: str = _setting("layer_norm", one_of("layer_norm", "rms_norm"))
    norm_eps: float = _setting(1e-6, number(0, 1))
    embed_norm: bool = _setting(False, boolean)
    pre_norm: bool = _setting(False, boolean)
    final_norm: bool = _setting(True, boolean)
    proj_bias: bool = _setting(True, boolean)
    qk_norm: bool = _setting(False, boolean)
    scale_attn_norm: bool = _setting(False, boolean)
    scale_mlp_norm: bool = _setting(False, boolean)
    init_values: float | None = _setting(None, optional(number(-1e6, 1e6)))
    representation_size: int | None = _setting(None, optional(integer(1, 65536)))
    drop_rate: float = _setting(0.0, _rate)
    pos_drop_rate: float = _setting(0.0, _rate)
    attn_drop_rate: float = _setting(0.0, _rate)
    proj_drop_rate: float = _setting(0.0, _rate)
    drop_path: float = _setting(0.0, _rate)

    def __post_init__(self) -> None:
        """Check each setting, then what they make together. Raises ValueError."""
        given = {name: _plain(value) for name, value in vars(self).items()}
        for name, value in checked(given, FIELDS).items():
            object.__setattr__(self, name, value)
        self._check_patches()
        self._check_head()
        if self.embed_dim % self.num_heads:
            fitting = [heads for heads in range(1, self.embed_dim + 1) if self.embed_dim % heads == 0]
            near = sorted(sorted(fitting, key=lambda heads: abs(heads - self.num_heads))[:2])
            problem = f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}"
            raise ValueError(f"{problem}: try {' or '.join(map(str, near))}")
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
            steps = tuple(zip(self.image_size, (h * self.stride, w * self.stride), strict=True))
            smaller = "x".join(str(max(1, side // step) * step) for side, step in steps)
            larger = "x".join(str(-(-side // step) * step) for side, step in steps)
            near = " or ".join(dict.fromkeys((smaller, larger)))
            patch = h if h == w else f"{h}x{w}"
            raise ValueError(f"{image} is not divisible by patch size {patch}: try {near}")

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
    def stride(self) -> int:
        """Pixels between the places of what is cut into patches: 1 in an image, more in a feature map."""
        if self.conv_chans is not None:
            return 2 ** (len(self.conv_chans) + 1)
        return 1 if self.resnet_layers is None else resnet.stride(self.resnet_layers)

    @property
    def feature_size(self) -> tuple[int, int]:
        """Height and width of what is cut into patches: the image's, or those of the feature map."""
        return -(-self.image_size[0] // self.stride), -(-self.image_size[1] // self.stride)  # rounded up

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
                hint = nearest(_OTHER_NAMES.get(name, name), FIELDS) or f"; known are {', '.join(sorted(FIELDS))}"
                raise TypeError(f"unknown model setting {name!r}{hint}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `ViTConfig(**d)` takes them back."""
        return dataclasses.asdict(self)


FIELDS = {field.name: field.metadata["check"] for field in dataclasses.fields(ViTConfig)}


def _plain(value: Any) -> Any:
    """A value with Python's numbers in place of NumPy's, also within lists and tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value
