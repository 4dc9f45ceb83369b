"""Google's checkpoints and model: arrays by the original JAX code's names, and its forward pass in torch."""

import math

import numpy as np
import torch

D, HEADS, HIDDEN, PATCH, SIDE = 48, 3, 100, (8, 8), 4


def fixture(*, classes=5, pre_logits=None, blocks=2, patch=PATCH, prefix="", seed=0):
    """The arrays of vit_jax's VisionTransformer with the classifier "token", with random numbers."""
    shapes = {
        "cls": (1, 1, D),
        "embedding/kernel": (*patch, 3, D),
        "embedding/bias": (D,),
        "Transformer/posembed_input/pos_embedding": (1, SIDE * SIDE + 1, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
    }
    for i in range(blocks):
        block = {f"LayerNorm_{n}/{kind}": (D,) for n in (0, 2) for kind in ("scale", "bias")}
        attention = "MultiHeadDotProductAttention_1"
        block |= {f"{attention}/{part}/kernel": (D, HEADS, D // HEADS) for part in ("query", "key", "value")}
        block |= {f"{attention}/{part}/bias": (HEADS, D // HEADS) for part in ("query", "key", "value")}
        block |= {f"{attention}/out/kernel": (HEADS, D // HEADS, D), f"{attention}/out/bias": (D,)}
        block |= {"MlpBlock_3/Dense_0/kernel": (D, HIDDEN), "MlpBlock_3/Dense_0/bias": (HIDDEN,)}
        block |= {"MlpBlock_3/Dense_1/kernel": (HIDDEN, D), "MlpBlock_3/Dense_1/bias": (D,)}
        shapes |= {f"Transformer/encoderblock_{i}/{name}": shape for name, shape in block.items()}
    if pre_logits:
        shapes |= {"pre_logits/kernel": (D, pre_logits), "pre_logits/bias": (pre_logits,)}
    if classes:
        shapes |= {"head/kernel": (pre_logits or D, classes), "head/bias": (classes,)}
    rng = np.random.default_rng(seed)
    return {prefix + name: rng.standard_normal(shape, dtype=np.float32) * 0.3 for name, shape in shapes.items()}


def jax_forward(arrays, images, approximate="none"):
    """The forward pass of vit_jax/models_vit.py, in torch, from the arrays as they are; images (B, H, W, C)."""
    w = {name.removeprefix("opt/target/"): torch.from_numpy(a.astype(np.float64)) for name, a in arrays.items()}

    def layer_norm(x, name):
        return torch.nn.functional.layer_norm(x, (D,), w[f"{name}/scale"], w[f"{name}/bias"], eps=1e-6)

    def dense(x, name):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def attention(x, name):
        q, k, v = (
            torch.einsum("bnd,dhk->bhnk", x, w[f"{name}/{part}/kernel"]) + w[f"{name}/{part}/bias"][:, None, :]
            for part in ("query", "key", "value")
        )
        share = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return torch.einsum("bhnk,hkd->bnd", share @ v, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]

    x = torch.from_numpy(images.astype(np.float64))
    ph, pw, _, _ = w["embedding/kernel"].shape
    x = x.unfold(1, ph, ph).unfold(2, pw, pw)  # (B, rows, columns, C, h, w)
    x = torch.einsum("brschw,hwcd->brsd", x, w["embedding/kernel"]).flatten(1, 2) + w["embedding/bias"]
    if "cls" in w:
        x = torch.cat([w["cls"].expand(len(x), -1, -1), x], dim=1)
    x = x + w["Transformer/posembed_input/pos_embedding"]
    for i in range(len({name.split("/")[1] for name in w if "encoderblock_" in name})):
        block = f"Transformer/encoderblock_{i}"
        x = x + attention(layer_norm(x, f"{block}/LayerNorm_0"), f"{block}/MultiHeadDotProductAttention_1")
        y = dense(layer_norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3/Dense_0")
        y = torch.nn.functional.gelu(y, approximate=approximate)
        x = x + dense(y, f"{block}/MlpBlock_3/Dense_1")
    x = layer_norm(x, "Transformer/encoder_norm")
    x = x[:, 0] if "cls" in w else x.mean(dim=1)  # the classifiers "token" and "gap"
    if "pre_logits/kernel" in w:
        x = torch.tanh(dense(x, "pre_logits"))
    return (dense(x, "head") if "head/kernel" in w else x).numpy()
