"""The same Vision Transformer in JAX, as its users would write it."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from peers import BETAS, EPS, LR, WEIGHT_DECAY, Peer

import tinyvit


def jax_peer(model: tinyvit.VisionTransformer, images: np.ndarray, labels: np.ndarray, device: str = "cpu") -> Peer:
    """On a GPU matrix products and attention are in bfloat16, the latter by cuDNN where it can."""
    jax.config.update("jax_default_device", jax.devices(device)[0])
    on_gpu = device != "cpu"
    low = jnp.bfloat16 if on_gpu else jnp.float32
    config = model.config
    parameters = {name: jnp.asarray(value) for name, value in model.state_dict().items()}
    heads = (len(images), config.num_tokens, config.num_heads, config.embed_dim // config.num_heads)
    attention = functools.partial(
        jax.nn.dot_product_attention, implementation=implementation(heads, low) if on_gpu else "xla"
    )

    def norm(p, name, x):
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        var = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + config.norm_eps) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(p, name, x):
        return x.astype(low) @ p[f"{name}.weight"].astype(low).T + p[f"{name}.bias"].astype(low)

    def forward(p, x):
        b = x.shape[0]
        (h, w), (rows, columns) = config.patch_size, config.grid_size
        x = x.reshape(b, config.in_chans, rows, h, columns, w).transpose(0, 2, 4, 1, 3, 5)
        x = x.reshape(b, rows * columns, -1).astype(low)
        x = x @ p["patch_embed.proj.weight"].reshape(config.embed_dim, -1).astype(low).T + p["patch_embed.proj.bias"]
        x = jnp.concatenate([jnp.broadcast_to(p["cls_token"], (b, 1, config.embed_dim)), x], 1) + p["pos_embed"]
        for i in range(config.depth):
            block = f"blocks.{i}"
            qkv = linear(p, f"{block}.attn.qkv", norm(p, f"{block}.norm1", x))
            q, k, v = qkv.reshape(b, x.shape[1], 3, config.num_heads, -1).transpose(2, 0, 1, 3, 4)
            y = attention(q, k, v).reshape(b, x.shape[1], -1)
            x = x + linear(p, f"{block}.attn.proj", y)
            y = jax.nn.gelu(linear(p, f"{block}.mlp.fc1", norm(p, f"{block}.norm2", x)), approximate=False)
            x = x + linear(p, f"{block}.mlp.fc2", y)
        return linear(p, "head", norm(p, "norm", x)[:, 0]).astype(jnp.float32)

    def loss_of(p, x, y):
        log_p = jax.nn.log_softmax(forward(p, x))
        return -jnp.take_along_axis(log_p, y[:, None], 1).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss_of))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2) if on_gpu else ())  # old weights and moments give their memory
    def update(p, m, v, count, x, y):
        loss, g = jax.value_and_grad(loss_of)(p, x, y)
        m = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, m, g)
        v = jax.tree.map(lambda v, g: BETAS[1] * v + (1 - BETAS[1]) * g * g, v, g)

        def new(p, m, v):
            hat_m, hat_v = m / (1 - BETAS[0] ** count), v / (1 - BETAS[1] ** count)
            return p * (1 - LR * WEIGHT_DECAY) - LR * hat_m / (jnp.sqrt(hat_v) + EPS)

        return jax.tree.map(new, p, m, v), m, v, loss

    m, v = (jax.tree.map(jnp.zeros_like, parameters) for _ in "mv")
    state = {"p": parameters, "m": m, "v": v, "count": 0.0}
    x, y = jnp.asarray(images), jnp.asarray(labels)

    def step() -> float | jax.Array:
        state["count"] += 1.0
        state["p"], state["m"], state["v"], loss = update(state["p"], state["m"], state["v"], state["count"], x, y)
        return loss if on_gpu else float(jax.block_until_ready(loss))

    def gradients() -> tuple[float, dict[str, np.ndarray]]:
        loss, g = value_and_grad(state["p"], x, y)
        return float(loss), {name: np.asarray(value) for name, value in g.items()}

    compiled = jax.jit(forward)

    def infer(batches: int) -> np.ndarray:
        return np.concatenate([np.asarray(y) for y in [compiled(state["p"], x) for _ in range(batches)]])

    return Peer("JAX", step, infer, gradients, lambda: jax.block_until_ready(state["p"]))


def implementation(shape: tuple[int, int, int, int], dtype: jnp.dtype) -> str:
    """The name of the attention to ask JAX for: "cudnn" if it takes such q, k and v (B, N, H, D), also backward."""

    def attend(x: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(x, x, x, implementation="cudnn").sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(attend))(jnp.zeros(shape, dtype)))
    except Exception as error:  # refused while tracing, compiling or running
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"JAX: attention is XLA's, for cuDNN's is refused ({reason})", file=sys.stderr)
        return "xla"
    return "cudnn"
