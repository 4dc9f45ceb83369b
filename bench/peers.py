"""The same Vision Transformer in PyTorch and JAX, as their users would write it, for the benchmarks to compare with.

Every builder takes a tinyvit model, copies its weights and returns a `Peer`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import tinyvit

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.05


@dataclass
class Peer:
    """One contender. `step` trains on its batch and waits for the result; `infer` gives logits."""

    name: str
    step: Callable[[], float]
    infer: Callable[[], np.ndarray]
    gradients: Callable[[], tuple[float, dict[str, np.ndarray]]]  # loss and gradients at the current weights


def tinyvit_peer(model: tinyvit.VisionTransformer, images: np.ndarray, labels: np.ndarray) -> Peer:
    optimizer = tinyvit.optim.AdamW(model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY)
    step = tinyvit.TrainStep(model, optimizer)

    def gradients() -> tuple[float, dict[str, np.ndarray]]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        loss = tinyvit.functional.cross_entropy(model(images), labels)
        return float(loss), dict(zip(names, tinyvit.grad(loss, parameters), strict=True))

    return Peer(
        "tinyvit",
        lambda: float(step(images, labels)),
        lambda: tinyvit.predict(model, images, batch_size=len(images)),
        gradients,
    )


def torch_peer(
    model: tinyvit.VisionTransformer, images: np.ndarray, labels: np.ndarray, compiled: bool = False, bf16: bool = False
) -> Peer:
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

    config = model.config

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

    net = ViT()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
    optimizer = torch.optim.AdamW(net.parameters(), LR, BETAS, EPS, WEIGHT_DECAY)
    forward = torch.compile(net) if compiled else net
    x, y = torch.from_numpy(images), torch.from_numpy(labels)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()

    def loss_of() -> torch.Tensor:
        with autocast():
            return cross_entropy(forward(x).float(), y)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    def infer() -> np.ndarray:
        with torch.no_grad(), autocast():
            return forward(x).float().numpy()

    def gradients() -> tuple[float, dict[str, np.ndarray]]:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss.item(), {name: p.grad.numpy().copy() for name, p in net.named_parameters()}

    name = "torch bf16" if bf16 else "torch.compile" if compiled else "torch"
    return Peer(name, step, infer, gradients)


def jax_peer(model: tinyvit.VisionTransformer, images: np.ndarray, labels: np.ndarray) -> Peer:
    import jax
    import jax.numpy as jnp

    config = model.config
    parameters = {name: jnp.asarray(value) for name, value in model.state_dict().items()}

    def norm(p, name, x):
        mean = x.mean(-1, keepdims=True)
        var = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + config.norm_eps) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(p, name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def forward(p, x):
        b = x.shape[0]
        (h, w), (rows, columns) = config.patch_size, config.grid_size
        x = x.reshape(b, config.in_chans, rows, h, columns, w).transpose(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)
        x = x @ p["patch_embed.proj.weight"].reshape(config.embed_dim, -1).T + p["patch_embed.proj.bias"]
        x = jnp.concatenate([jnp.broadcast_to(p["cls_token"], (b, 1, config.embed_dim)), x], 1) + p["pos_embed"]
        for i in range(config.depth):
            block = f"blocks.{i}"
            qkv = linear(p, f"{block}.attn.qkv", norm(p, f"{block}.norm1", x))
            q, k, v = qkv.reshape(b, x.shape[1], 3, config.num_heads, -1).transpose(2, 0, 1, 3, 4)
            y = jax.nn.dot_product_attention(q, k, v).reshape(b, x.shape[1], -1)
            x = x + linear(p, f"{block}.attn.proj", y)
            y = jax.nn.gelu(linear(p, f"{block}.mlp.fc1", norm(p, f"{block}.norm2", x)), approximate=False)
            x = x + linear(p, f"{block}.mlp.fc2", y)
        return linear(p, "head", norm(p, "norm", x)[:, 0])

    def loss_of(p, x, y):
        log_p = jax.nn.log_softmax(forward(p, x))
        return -jnp.take_along_axis(log_p, y[:, None], 1).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss_of))

    @jax.jit
    def update(p, m, v, count, x, y):
        loss, g = jax.value_and_grad(loss_of)(p, x, y)
        m = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, m, g)
        v = jax.tree.map(lambda v, g: BETAS[1] * v + (1 - BETAS[1]) * g * g, v, g)

        def new(p, m, v):
            hat_m, hat_v = m / (1 - BETAS[0] ** count), v / (1 - BETAS[1] ** count)
            return p * (1 - LR * WEIGHT_DECAY) - LR * hat_m / (jnp.sqrt(hat_v) + EPS)

        return jax.tree.map(new, p, m, v), m, v, loss

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    state = {"p": parameters, "m": zeros, "v": zeros, "count": 0.0}
    x, y = jnp.asarray(images), jnp.asarray(labels)

    def step() -> float:
        state["count"] += 1.0
        state["p"], state["m"], state["v"], loss = update(state["p"], state["m"], state["v"], state["count"], x, y)
        return float(jax.block_until_ready(loss))

    def gradients() -> tuple[float, dict[str, np.ndarray]]:
        loss, g = value_and_grad(state["p"], x, y)
        return float(loss), {name: np.asarray(value) for name, value in g.items()}

    compiled = jax.jit(forward)
    return Peer("JAX", step, lambda: np.asarray(compiled(state["p"], x)), gradients)
