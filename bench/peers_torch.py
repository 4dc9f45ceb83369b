"""The same Vision Transformer in PyTorch, as its users would write it: eager, compiled, or with bfloat16 autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from peers import BETAS, CHECKED, EPS, LR, WEIGHT_DECAY, Peer
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import tinyvit


def vit(config: tinyvit.ViTConfig) -> nn.Module:
    """With the names of tinyvit's state dict."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
            self.proj = nn.Linear(config.embed_dim, config.embed_dim)

        def forward(self, x):
            b, n, d = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, config.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
            self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)

        def forward(self, x):
            return self.fc2(gelu(self.fc1(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
            self.attn = Attention()
            self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
            self.mlp = Mlp()

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class PatchEmbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.embed_dim))
            self.patch_embed = PatchEmbed()
            self.blocks = nn.ModuleList(Block() for _ in range(config.depth))
            self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
            self.head = nn.Linear(config.embed_dim, config.num_classes)

        def forward(self, x):
            x = self.patch_embed(x)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    return ViT()


def torch_peer(
    model: tinyvit.VisionTransformer,
    images: np.ndarray,
    labels: np.ndarray,
    device: str = "cpu",
    compiled: bool = False,
    bf16: bool = False,
) -> Peer:
    """On a GPU always with bfloat16 autocast and the fused optimizer. "max-autotune" would tune for minutes a model."""
    name = "torch bf16" if bf16 else "torch.compile" if compiled else "torch"
    on_gpu = device != "cpu"
    bf16 = bf16 or on_gpu
    net = vit(model.config)
    net.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), LR, BETAS, EPS, WEIGHT_DECAY, fused=on_gpu or None)
    forward = torch.compile(net, mode="default") if compiled else net
    x, y = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)

    def autocast():
        return torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def loss_of() -> torch.Tensor:
        with autocast():
            return cross_entropy(forward(x).float(), y)

    def step() -> float | torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach() if on_gpu else loss.item()

    def infer(batches: int) -> np.ndarray:
        with torch.no_grad(), autocast():
            return torch.cat([forward(x).float() for _ in range(batches)]).cpu().numpy()

    def gradients() -> tuple[float, dict[str, np.ndarray]]:
        optimizer.zero_grad()
        if on_gpu:
            with torch.backends.cudnn.flags(allow_tf32=False):
                loss = cross_entropy(net(x[:CHECKED]), y[:CHECKED])
                loss.backward()
        else:
            loss = loss_of()
            loss.backward()
        found = {name: p.grad.cpu().numpy().copy() for name, p in net.named_parameters()}
        optimizer.zero_grad()
        return loss.item(), found

    return Peer(name, step, infer, gradients, torch.cuda.synchronize if on_gpu else lambda: None)


def onednn_peer(model: tinyvit.VisionTransformer, images: np.ndarray, labels: np.ndarray, device: str) -> Peer:
    """Inference with weights packed for oneDNN, which torch uses in place of MKL's products only for packed weights."""
    from torch.utils import mkldnn

    net = vit(model.config).eval()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
    net = mkldnn.to_mkldnn(net)
    x = torch.from_numpy(images)

    def infer(batches: int) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([net(x) for _ in range(batches)]).numpy()

    def no_training(*_: Any) -> Any:
        raise NotImplementedError("packed weights cannot be trained")

    return Peer("torch oneDNN", no_training, infer, no_training)
