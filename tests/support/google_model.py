"""Google's checkpoints and model: arrays by the original JAX code's names, and its forward pass in torch."""

import math

import numpy as np
import torch
import torch.nn.functional as TF
from reference_resnet import same

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


def google_arrays(layers, patch, four=False):
    """vit_jax's VisionTransformer with a ResNet; `four`: norms of four axes, as in the files of the first release."""
    rng, shapes, inputs = np.random.default_rng(3), {"conv_root/kernel": (7, 7, 3, 64), "gn_root": 64}, 64
    for i, depth in enumerate(layers):
        inner, outputs = 64 * 2**i, 256 * 2**i
        for j in range(depth):
            unit = f"block{i + 1}/unit{j + 1}"
            if j == 0:
                shapes |= {f"{unit}/conv_proj/kernel": (1, 1, inputs, outputs), f"{unit}/gn_proj": outputs}
            shapes |= {f"{unit}/conv1/kernel": (1, 1, outputs if j else inputs, inner), f"{unit}/gn1": inner}
            shapes |= {f"{unit}/conv2/kernel": (3, 3, inner, inner), f"{unit}/gn2": inner}
            shapes |= {f"{unit}/conv3/kernel": (1, 1, inner, outputs), f"{unit}/gn3": outputs}
        inputs = outputs
    arrays = fixture(patch=(patch, patch))
    for name, shape in shapes.items():
        if isinstance(shape, int):
            for kind in ("scale", "bias"):
                values = rng.standard_normal(shape, dtype=np.float32) * 0.3 + (kind == "scale")
                arrays[f"{name}/{kind}"] = values.reshape(1, 1, 1, -1) if four else values
        else:
            arrays[name] = rng.standard_normal(shape, dtype=np.float32) * 0.1 + 0.05
    arrays["embedding/kernel"] = rng.standard_normal((patch, patch, inputs, 48), dtype=np.float32) * 0.1
    return arrays


def jax_resnet(arrays, images, layers, original):
    """models_resnet.py in torch, from the arrays as they are, with timm's constants or its own; images (B, H, W, C)."""
    w = {name: torch.from_numpy(a.astype(np.float64)) for name, a in arrays.items()}

    def conv(x, name, stride=1):
        kernel = w[f"{name}/kernel"] - w[f"{name}/kernel"].mean(dim=(0, 1, 2))
        std = kernel.std(dim=(0, 1, 2), correction=0)
        kernel = kernel / (std + 1e-5 if original else torch.sqrt(std**2 + 1e-8))
        return TF.conv2d(same(x, kernel.shape[0], stride), kernel.permute(3, 2, 0, 1), stride=stride)

    def norm(x, name):
        scale, bias = w[f"{name}/scale"].flatten(), w[f"{name}/bias"].flatten()
        return TF.group_norm(x, 32, scale, bias, 1e-6 if original else 1e-5)

    x = torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2)
    x = torch.relu(norm(conv(x, "conv_root", 2), "gn_root"))
    x = TF.max_pool2d(same(x, 3, 2, -torch.inf), 3, 2)
    for i, depth in enumerate(layers):
        for j in range(depth):
            unit, stride = f"block{i + 1}/unit{j + 1}", 2 if i and not j else 1
            residual = x if j else norm(conv(x, f"{unit}/conv_proj", stride), f"{unit}/gn_proj")
            x = torch.relu(norm(conv(x, f"{unit}/conv1"), f"{unit}/gn1"))
            x = torch.relu(norm(conv(x, f"{unit}/conv2", stride), f"{unit}/gn2"))
            x = torch.relu(residual + norm(conv(x, f"{unit}/conv3"), f"{unit}/gn3"))
    return x.permute(0, 2, 3, 1).numpy()
