"""Parts that only some Vision Transformers have; a config chooses them. Names of parameters are timm's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tinyvit import functional as F
from tinyvit import nn
from tinyvit.engine.ops import broadcast_to, cos, sin, stack
from tinyvit.engine.tensor import Tensor
from tinyvit.models.config import ViTConfig

QUICK_GELU = 1.702  # x sigmoid(1.702 x), in OpenAI's CLIP


def norm(config: ViTConfig, dim: int) -> nn.Module:
    """The model's kind of normalisation, over `dim` channels."""
    return (nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm)(dim, config.norm_eps)


def norm_if(present: bool, config: ViTConfig, dim: int) -> nn.Module:
    return norm(config, dim) if present else nn.Identity()


class ConvTokenizer(nn.Module):
    """Images -> one token for each place of what convolutions with pooling make of them.

    Each is 3x3 pixels wide, followed by a ReLU and 3x3 max-pooling in steps of 2 (Hassani et al. 2021,
    arXiv:2104.05704, section 3.3). The ReLU comes last here: it changes no order, and has a quarter of the values left.
    """

    def __init__(self, chans: Sequence[int]) -> None:
        self.convs = [
            nn.Conv2d(before, after, 3, padding=1, bias=False, weight_init=nn.init.he_normal)
            for before, after in itertools.pairwise(chans)
        ]

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W)
        x = images
        for conv in self.convs:
            x = F.relu(F.max_pool2d(conv(x), 3, stride=2, padding=1))
        return x.reshape(*x.shape[:2], -1).transpose()  # (B, rows x columns, D)


def sincos2d(grid_size: tuple[int, int], dim: int, length: int) -> np.ndarray:
    """Fixed position embeddings: sines and cosines of a patch's column and row.

    From Chen et al. 2021 (arXiv:2104.02057), in the form of Beyer et al. 2022 (arXiv:2205.01580).

    Args:
        grid_size: rows and columns of patches.
        dim: a quarter of it is the number of frequencies, which go from 1 to 1 / 10,000.
        length: number of tokens; those before the patches get zeros.

    Returns:
        (1, length, dim) float32.
    """
    y, x = np.mgrid[: grid_size[0], : grid_size[1]].reshape(2, -1, 1)
    omega = 10_000.0 ** -(np.arange(dim // 4) / max(dim // 4 - 1, 1))
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    prefix = np.zeros((length - len(table), dim))
    return np.concatenate([prefix, table])[None].astype(np.float32)


class SwiGLU(nn.Module):
    """A gated MLP (Shazeer 2020, arXiv:2002.05202): `fc1` makes the gate, then what passes through it."""

    def __init__(self, config: ViTConfig) -> None:
        self.fc1 = nn.Linear(config.embed_dim, 2 * config.mlp_dim, config.proj_bias)
        self.norm = norm_if(config.scale_mlp_norm, config, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim, config.proj_bias)
        self.drop = nn.Dropout(config.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        x = self.norm(self.drop(F.swiglu(self.fc1(x))))  # (B, N, mlp_dim)
        return self.drop(self.fc2(x))  # (B, N, D)


class Rotary(nn.Module):
    """Rotary positions in two dimensions: queries and keys are turned by angles that say where their patch is.

    `config.rope` names the kind, a row of ROPES. An angle is a frequency times a patch's row or column; of the "mixed"
    kind (Heo et al. 2024, arXiv:2403.13298) it is the sum of both, with learned frequencies. Tokens before the patches
    are not turned.
    """

    def __init__(self, config: ViTConfig) -> None:
        kind, dim = ROPES[str(config.rope)], config.embed_dim // config.num_heads
        self.interleaved = kind.interleaved
        patches = patch_places(config, kind)
        places = np.concatenate([np.zeros((config.num_prefix_tokens, 2)), patches])  # (N, 2)
        bands = kind.temperature ** -(np.arange(dim // 4) / (dim // 4))
        if kind.learned:
            turn = np.pi * np.arange(2)[:, None, None] / 2  # along rows, then columns; training finds other directions
            freqs = np.concatenate([np.cos(turn) * bands, np.cos(turn - np.pi / 2) * bands], axis=-1)
            freqs = np.repeat(freqs, config.num_heads, axis=1)  # (2, heads, D / 2)
            self.freqs = nn.Parameter(freqs.astype(np.float32))
            self.places = nn.Buffer(places.astype(np.float32), persistent=False)
        else:
            angles = (places[:, :, None] * bands).reshape(1, len(places), dim // 2)
            self.cos = nn.Buffer(np.cos(angles).astype(np.float32), persistent=False)
            self.sin = nn.Buffer(np.sin(angles).astype(np.float32), persistent=False)

    def forward(self, *tensors: Tensor) -> list[Tensor]:  # (B, heads, N, D / heads) each
        cos_sin = self.cos_sin()
        return [F.rotary(x, *cos_sin, interleaved=self.interleaved) for x in tensors]

    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles (heads or 1, N, D / (2 heads))."""
        if not hasattr(self, "freqs"):
            return self.cos, self.sin
        rows = self.freqs.reshape(2, *self.freqs.shape[1:2], 1, -1)  # (2, heads, 1, D / 2)
        angles = self.places[:, :1] * rows[0, ...] + self.places[:, 1:] * rows[1, ...]
        return cos(angles), sin(angles)


class Rope(NamedTuple):
    """A kind of rotary positions."""

    temperature: float  # the lowest frequency is about 1 / temperature
    centred: bool = False  # places go from -2 pi to 2 pi over the image; else they are numbers of rows and columns
    columns_first: bool = False
    after_class: bool = False  # numbers start at 1 behind a class token
    interleaved: bool = True
    learned: bool = False


ROPES = {
    "eva": Rope(10_000.0),  # Fang et al. 2023, arXiv:2303.11331
    "dinov3": Rope(100.0, centred=True, interleaved=False),  # Simeoni et al. 2025, arXiv:2508.10104
    "pe": Rope(10_000.0, columns_first=True, after_class=True),  # Bolya et al. 2025, arXiv:2504.13181
    "axial": Rope(100.0, columns_first=True),  # Heo et al. 2024, arXiv:2403.13298
    "mixed": Rope(10.0, columns_first=True, learned=True),  # the same
}


def patch_places(config: ViTConfig, kind: Rope) -> np.ndarray:
    """Where each patch is: (patches, 2), its row and its column in the units and the order of the kind."""
    places = []
    for count, reference in zip(config.grid_size, config.rope_grid or config.grid_size, strict=True):
        if kind.centred:
            places.append(2.0 * np.pi * (2.0 * (np.arange(count) + 0.5) / count - 1.0))
        else:
            places.append((np.arange(count) + float(kind.after_class and config.class_token)) * reference / count)
    grid = np.stack(np.meshgrid(*places, indexing="ij"), axis=-1).reshape(-1, 2)
    return grid[:, ::-1] if kind.columns_first else grid


def with_queries_and_keys(
    qkv: Tensor, num_heads: int, change: Callable[[Tensor, Tensor], Sequence[Tensor]]
) -> Tensor:  # (B, N, 3 D)
    """The packed queries, keys and values, with `change` applied to queries and keys, (B, heads, N, D / heads) each."""
    batch, n, width = qkv.shape
    split = qkv.reshape(batch, n, 3, num_heads, width // (3 * num_heads)).permute_dims(2, 0, 3, 1, 4)
    q, k = change(split[0, ...], split[1, ...])
    return stack([q, k, split[2, ...]]).permute_dims(1, 3, 0, 2, 4).reshape(qkv.shape)


class AttentionPool(nn.Module):
    """One learned query reads all patches, then comes an MLP (Zhai et al. 2021, arXiv:2106.04560, section 3.4: MAP)."""

    def __init__(self, config: ViTConfig, mlp: nn.Module) -> None:
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(nn.init.normal((1, 1, dim), std=dim**-0.5))
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = norm(config, dim)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        batch, _, dim = x.shape

        def heads(x: Tensor) -> Tensor:  # (B, N, D)
            return x.reshape(*x.shape[:2], self.num_heads, -1).permute_dims(0, 2, 1, 3)  # (B, heads, N, D / heads)

        kv = self.kv(x)  # (B, N, 2 D)
        q = heads(broadcast_to(self.q(self.latent), (batch, 1, dim)))
        y = F.attention(q, heads(kv[:, :, :dim]), heads(kv[:, :, dim:]))  # (B, heads, 1, D / heads)
        y = self.proj(y.reshape(batch, 1, dim))
        return (y + self.mlp(self.norm(y)))[:, 0, :]  # (B, D)


class SequencePool(nn.Module):
    """The mean of all tokens with learned weights (Hassani et al. 2021, arXiv:2104.05704, section 3.2)."""

    def __init__(self, dim: int) -> None:
        self.weight = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        return (F.softmax(self.weight(x), axis=1) * x).sum(axis=1)  # (B, D)
