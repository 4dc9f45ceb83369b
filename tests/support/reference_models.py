"""A plain Vision Transformer in torch.nn with our parameter names, which the tests compare ours with."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from reference_resnet import torch_backbone
from torch import nn

from tinyvit.backend import random
from tinyvit.models.config import ViTConfig
from tinyvit.models.vit import VisionTransformer


def torch_norm(c: ViTConfig, dim: int, present: bool = True) -> nn.Module:
    return (nn.RMSNorm if c.norm == "rms_norm" else nn.LayerNorm)(dim, c.norm_eps) if present else nn.Identity()


class TorchAttention(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.c = c
        self.heads = c.num_heads
        self.qkv = nn.Linear(c.embed_dim, 3 * c.embed_dim, bias=c.qkv_bias)
        self.q_norm, self.k_norm = (torch_norm(c, c.embed_dim // c.num_heads, c.qk_norm) for _ in range(2))
        self.norm = torch_norm(c, c.embed_dim, c.scale_attn_norm)
        self.proj = nn.Linear(c.embed_dim, c.embed_dim, bias=c.proj_bias)
        if c.rope == "mixed":
            self.rope = nn.Module()
            self.rope.freqs = nn.Parameter(torch.zeros(2, c.num_heads, c.embed_dim // c.num_heads // 2))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, N, D)
        """The pairs of entries of the patches as complex numbers, times exp(i angle); "mixed" alone."""
        rows, columns = (torch.arange(n, dtype=x.dtype) for n in self.c.grid_size)
        places = torch.cartesian_prod(rows, columns).flip(1)  # (patches, 2): column, row
        angles = torch.einsum("na,ahd->hnd", places, self.rope.freqs)
        prefix, patches = x[:, :, : self.c.num_prefix_tokens], x[:, :, self.c.num_prefix_tokens :]
        turned = torch.view_as_complex(patches.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)
        return torch.cat([prefix, torch.view_as_real(turned).flatten(-2)], dim=2)

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # (B, N, D)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        return (self.rotated(q), self.rotated(k), v) if self.c.rope else (q, k, v)  # (B, H, N, D / H) each

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.queries_keys_values(x)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(self.norm(y))


class TorchMlp(nn.Module):
    def __init__(self, c: ViTConfig, gated: bool) -> None:
        super().__init__()
        hidden = int(c.mlp_ratio * c.embed_dim)
        self.gated, self.quick = gated, c.act == "quick_gelu"
        self.fc1 = nn.Linear(c.embed_dim, 2 * hidden if gated else hidden, bias=c.proj_bias)
        self.act = nn.GELU(approximate="tanh" if c.act == "gelu_tanh" else "none")
        self.norm = torch_norm(c, hidden, c.scale_mlp_norm)
        self.fc2 = nn.Linear(hidden, c.embed_dim, bias=c.proj_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = nn.functional.silu(gate) * x
        else:
            x = x * torch.sigmoid(1.702 * x) if self.quick else self.act(x)
        return self.fc2(self.norm(x))


class TorchAttentionPool(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.heads, dim = c.num_heads, c.embed_dim
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm, self.mlp = torch_norm(c, dim), TorchMlp(c, gated=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(self.latent).expand(len(x), -1, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, *self.kv(x).chunk(2, dim=-1)))
        y = self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (y + self.mlp(self.norm(y)))[:, 0]


class Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class TorchBlock(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.norm1 = torch_norm(c, c.embed_dim)
        self.attn = TorchAttention(c)
        self.norm2 = torch_norm(c, c.embed_dim)
        self.mlp = TorchMlp(c, c.swiglu)
        self.ls1 = nn.Identity() if c.init_values is None else Scale(c.embed_dim)
        self.ls2 = nn.Identity() if c.init_values is None else Scale(c.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TorchViT(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.c, dim = c, c.embed_dim
        for name, count in (
            ("cls_token", c.class_token),
            ("dist_token", c.distilled),
            ("reg_token", c.reg_tokens),
        ):
            setattr(self, name, nn.Parameter(torch.zeros(1, int(count), dim)) if count else None)
        prefix = 0 if c.no_embed_class else int(c.class_token) + int(c.distilled) + c.reg_tokens
        self.patch_embed, features = nn.Module(), torch.zeros(1, c.in_chans, *c.image_size)
        self.patch_embed.backbone = nn.Identity()
        if c.resnet_layers is not None:
            self.patch_embed.backbone = torch_backbone(c.in_chans, c.resnet_layers)
            with torch.no_grad():
                features = self.patch_embed.backbone(features)
        if c.conv_chans is not None:
            chans = (c.in_chans, *c.conv_chans, dim)
            self.patch_embed.convs = nn.ModuleList(
                nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in itertools.pairwise(chans)
            )
            features = self.tokens(features)
        else:
            self.patch_embed.proj = nn.Conv2d(
                features.shape[1], dim, c.patch_size, stride=c.patch_size, bias=not c.pre_norm
            )
        self.patch_embed.norm = torch_norm(c, dim, c.embed_norm)
        self.norm_pre = torch_norm(c, dim, c.pre_norm)
        rows, columns = (n // p for n, p in zip(features.shape[2:], c.patch_size, strict=True))
        self.pos_embed = None if c.pos_embed == "none" else nn.Parameter(torch.zeros(1, prefix + rows * columns, dim))
        self.blocks = nn.ModuleList(TorchBlock(c) for _ in range(c.depth))
        if c.global_pool == "seq":
            self.seq_pool = nn.Module()
            self.seq_pool.weight = nn.Linear(dim, 1)
        self.pools_first = c.global_pool == "avg" and c.fc_norm is not False
        if self.pools_first:
            self.fc_norm = torch_norm(c, dim, c.final_norm)
        else:
            self.norm = torch_norm(c, dim, c.final_norm)
        if c.global_pool == "map":
            self.attn_pool = TorchAttentionPool(c)
        if c.representation_size:
            self.pre_logits = nn.Module()
            self.pre_logits.fc = nn.Linear(dim, c.representation_size)
        self.head = nn.Linear(c.representation_size or dim, c.num_classes) if c.num_classes else nn.Identity()
        if c.distilled and c.num_classes:
            self.head_dist = nn.Linear(dim, c.num_classes)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        if self.c.conv_chans is None:
            return self.patch_embed.proj(self.patch_embed.backbone(images))
        for conv in self.patch_embed.convs:
            images = nn.functional.max_pool2d(conv(images).relu(), 3, stride=2, padding=1)
        return images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.norm(self.tokens(images).flatten(2).transpose(1, 2))  # (B, N, D)
        tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        if self.pos_embed is None:
            x = torch.cat([*tokens, x], dim=1)
        elif self.c.no_embed_class:
            x = torch.cat([*tokens, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*tokens, x], dim=1) + self.pos_embed
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        if not self.pools_first:
            x = self.norm(x)
        pooled = x[:, 0]
        patches = x[:, sum(t.shape[1] for t in tokens) :]
        if self.c.global_pool == "avg":
            pooled = patches.mean(dim=1)
        elif self.c.global_pool == "map":
            pooled = self.attn_pool(patches)
        elif self.c.global_pool == "seq":
            weights = self.seq_pool.weight(patches).softmax(dim=1).transpose(1, 2)  # (B, 1, N)
            pooled = (weights @ patches).squeeze(1)
        if self.pools_first:
            pooled = self.fc_norm(pooled)
        if self.c.representation_size:
            pooled = torch.tanh(self.pre_logits.fc(pooled))
        if self.c.distilled and self.c.num_classes:
            return (self.head(pooled) + self.head_dist(x[:, 1])) / 2
        return self.head(pooled)


def torch_twin(model: VisionTransformer) -> TorchViT:
    """The torch model with the same weights, in float64; loading is strict, so all names and shapes must agree."""
    twin = TorchViT(model.config).double()
    twin.load_state_dict({name: torch.tensor(x, dtype=torch.float64) for name, x in model.state_dict().items()})
    return twin


def randomise(model: VisionTransformer, seed: int = 0) -> VisionTransformer:
    """Weights without the zeros and ones of an initialisation, behind which gradients would hide."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        noise = rng.standard_normal(p.shape)
        if p.ndim == 1:
            p.data = p.data + (0.2 * noise).astype(p.dtype)
        elif "token" in name or "pos_embed" in name:
            p.data = (0.5 * noise).astype(p.dtype)
        else:
            fan_in = p.size // p.shape[0]
            p.data = (noise / fan_in**0.5).astype(p.dtype)
    return model


SMALL = ViTConfig(
    image_size=(8, 8), patch_size=(4, 4), num_classes=5, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2.0
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one channel, one head, one block": dict(in_chans=1, num_heads=1, depth=1),
    "rectangular": dict(image_size=(6, 20), patch_size=(3, 5), in_chans=4),
    "one patch": dict(patch_size=8),
    "pixels beyond the last patch": dict(image_size=(11, 14), patch_size=(4, 3), trim_image=True),
    "average": dict(global_pool="avg"),
    "average without a class token": dict(global_pool="avg", class_token=False),
    "average with register tokens": dict(global_pool="avg", reg_tokens=3),
    "norm before the average": dict(global_pool="avg", fc_norm=False, reg_tokens=1),
    "a stem before the patches": dict(resnet_layers=(), image_size=(33, 24), patch_size=(3, 2)),
    "a stem before the only patch": dict(resnet_layers=(), patch_size=2),
    "a ResNet before the patches": dict(resnet_layers=(2, 1), image_size=(30, 41), patch_size=(2, 1), in_chans=2),
    "convolutions before the tokens": dict(
        patch_size=1, conv_chans=(6, 5), image_size=(17, 8), class_token=False, global_pool="seq"
    ),
    "one convolution before the tokens": dict(patch_size=1, conv_chans=(), in_chans=2),
    "sequence pooling without the register tokens": dict(global_pool="seq", reg_tokens=2),
    "register tokens": dict(reg_tokens=2),
    "register tokens outside the embedding": dict(reg_tokens=2, no_embed_class=True),
    "distilled": dict(distilled=True),
    "distilled, register tokens, layer scale": dict(distilled=True, reg_tokens=1, init_values=0.1),
    "layer scale": dict(init_values=1e-2),
    "pre-logits": dict(representation_size=7),
    "no bias of queries, keys and values": dict(qkv_bias=False),
    "tanh GELU": dict(act="gelu_tanh", mlp_ratio=2.5),
    "sines and cosines": dict(pos_embed="sincos2d", image_size=(8, 12)),
    "large epsilon": dict(norm_eps=0.1),
    "a norm before the blocks, none behind them, quick GELU": dict(pre_norm=True, final_norm=False, act="quick_gelu"),
    "RMS norms everywhere": dict(
        norm="rms_norm", embed_norm=True, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, norm_eps=1e-3
    ),
    "gated MLPs without biases": dict(swiglu=True, proj_bias=False),
    "gated MLPs with norms": dict(swiglu=True, scale_mlp_norm=True, global_pool="avg"),
    "attention pooling": dict(global_pool="map", class_token=False, act="gelu_tanh"),
    "attention pooling behind register tokens": dict(global_pool="map", reg_tokens=2, swiglu=True),
    "learned rotary positions alone": dict(rope="mixed", pos_embed="none", image_size=(8, 12)),
    "features": dict(num_classes=0),
    "features of a distilled model with pre-logits": dict(num_classes=0, distilled=True, representation_size=7),
}


def build(dtype: str = "float32", **changes: Any) -> VisionTransformer:
    """A small model with random weights."""
    with random.scope(0):
        model = VisionTransformer(SMALL.replace(**changes)).to(dtype)
    return randomise(model) if changes.get("pos_embed") != "sincos2d" else model
