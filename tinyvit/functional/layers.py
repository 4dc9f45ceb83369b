"""The ViT's operations on Tensors: linear layers, norms, activations, attention, images, dropout."""

from __future__ import annotations

from tinyvit import kernels
from tinyvit.backend import arrays, random
from tinyvit.engine.ops import multiply
from tinyvit.engine.tape import recording
from tinyvit.engine.tensor import Array, Tensor, apply, array_of
from tinyvit.functional import checks
from tinyvit.functional.checks import Input, Pair, Shape
from tinyvit.kernels import reference


def linear(x: Input, weight: Input, bias: Input | None = None) -> Tensor:
    """x W^T + b on the last axis.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features).
    """
    checks.linear(x, weight, bias)
    return apply(reference.linear, x, weight, bias)


def linear_gelu(x: Input, weight: Input, bias: Input, approximate: str = "none") -> Tensor:
    """gelu(linear(x, weight, bias), approximate) in one operation: the first half of an MLP."""
    checks.linear(x, weight, bias)
    checks.approximate(approximate)
    return apply(reference.linear_gelu, x, weight, bias, approximate=approximate)


def add_linear(residual: Input, x: Input, weight: Input, bias: Input | None = None) -> Tensor:
    """residual (..., out_features) + linear(x, weight, bias) in one operation: the end of a residual branch."""
    checks.linear(x, weight, bias)
    checks.residual("add_linear", residual, x, weight)
    return apply(reference.add_linear, residual, x, weight, bias)


def mlp(
    x: Input, weight1: Input, bias1: Input, weight2: Input, bias2: Input,
    approximate: str = "none", residual: Input | None = None,
) -> Tensor:  # fmt: skip
    """linear(linear_gelu(x, weight1, bias1, approximate), weight2, bias2) in one operation.

    It is added to `residual` (..., out_features) where there is one.
    """
    checks.linear(x, weight1, bias1)
    checks.second_linear(weight1, weight2, bias2)
    checks.approximate(approximate)
    if residual is not None:
        checks.residual("mlp", residual, x, weight2)
    return apply(reference.mlp, residual, x, weight1, bias1, weight2, bias2, approximate=approximate)


def layer_norm(x: Input, weight: Input, bias: Input, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450).

    (x - mean) / sqrt(var + eps) * weight + bias. Unlike torch's it takes no normalized_shape, and eps is the ViT's.

    Args:
        x: (..., D).
        weight, bias: (D,).
        eps: keeps the divisor above 0.

    Returns:
        (..., D).
    """
    checks.no_normalized_shape("layer_norm(x, weight, bias)", weight)
    checks.layer_norm(x, weight, bias)
    return apply(reference.layer_norm, x, weight, bias, eps=eps)


def group_norm(x: Input, num_groups: int, weight: Input, bias: Input, eps: float = 1e-5) -> Tensor:
    """Group normalisation (Wu & He 2018, arXiv:1803.08494).

    (x - mean) / sqrt(var + eps) over the channels of a group, height and width of each sample, then
    * weight + bias by channel.

    Args:
        x: (B, C, H, W).
        num_groups: of equal size; divides C.
        weight, bias: (C,).
        eps: keeps the divisor above 0.

    Returns:
        (B, C, H, W).
    """
    checks.group_norm(x, num_groups, weight, bias)
    return apply(reference.group_norm, x, weight, bias, num_groups=num_groups, eps=eps)


def weight_standardize(weight: Input, eps: float = 1e-8) -> Tensor:
    """Weight standardization (Qiao et al. 2019, arXiv:1903.10520).

    (w - mean) / sqrt(var + eps) over the weights of each output; weight (O, C, h, w), returns the same shape.
    """
    if len(checks.shape(weight)) != 4:
        raise ValueError(f"weight_standardize expects weight (O, C, h, w), got {checks.shape(weight)}")
    return apply(reference.weight_standardize, weight, eps=eps)


def relu(x: Input) -> Tensor:
    """x where it is positive, else 0, elementwise; its gradient at 0 is 0."""
    return apply(reference.relu, x)


def gelu(x: Input, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit x Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415), elementwise.

    Args:
        x: any shape.
        approximate: "none" for the exact function (erf), "tanh" for 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    """
    checks.approximate(approximate)
    return apply(reference.gelu, x, approximate=approximate)


def softmax(x: Input, axis: int = -1, *, dim: int | None = None) -> Tensor:
    """exp(x) / sum(exp(x)) along `axis` (`dim` is torch's name for it), computed without overflow."""
    return apply(reference.softmax, x, axis=axis if dim is None else dim)


def log_softmax(x: Input, axis: int = -1, *, dim: int | None = None) -> Tensor:
    """log(softmax(x)) along `axis` (`dim` is torch's name for it), computed without overflow."""
    return apply(reference.log_softmax, x, axis=axis if dim is None else dim)


# --- attention ------------------------------------------------------------------------------------------------------


def attention(
    q: Input, k: Input, v: Input, mask: Input | None = None, dropout: float = 0.0, training: bool = True
) -> Tensor:
    """Scaled dot-product attention softmax(q k^T / sqrt(D) + mask) v (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        q: queries (B, H, N, D).
        k: keys (B, H, M, D).
        v: values (B, H, M, E).
        mask: broadcastable to (B, H, N, M): booleans (True: the query may read the key) or numbers of q's dtype, which
            are added to the scores. No gradient goes to it.
        dropout: probability of zeroing an attention weight while `training`.

    Returns:
        (B, H, N, E); zeros for a query that may read no key.
    """
    checks.attention(q, k, v)
    batch, heads, queries, _ = q.shape
    scores = (batch, heads, queries, k.shape[2])
    mask, keep = checks.attention_mask(mask, array_of(q), scores), _dropout_mask(q, dropout, training, scores[1:])
    return apply(reference.attention, q, k, v, mask=mask, dropout_mask=keep)


def qkv_attention(
    qkv: Input,
    num_heads: int,
    mask: Input | None = None,
    dropout: float = 0.0,
    training: bool = True,
    queries: int | None = None,
) -> Tensor:
    """Multi-head self-attention on queries, keys and values packed by one linear layer.

    Args:
        qkv: (B, N, 3 * num_heads * D): queries of all heads, then keys, then values.
        num_heads: H.
        mask, dropout, training: as in `attention`.
        queries: the number Q of first tokens whose output is computed; all N if None.

    Returns:
        (B, Q, num_heads * D), heads side by side.
    """
    checks.heads(qkv, num_heads)
    batch, tokens, _ = qkv.shape
    if queries is not None and not 0 < queries <= tokens:
        raise ValueError(f"queries must lie in 1 ... {tokens} tokens, got {queries}")
    scores = (batch, num_heads, queries or tokens, tokens)
    mask, keep = checks.attention_mask(mask, array_of(qkv), scores), _dropout_mask(qkv, dropout, training, scores[1:])
    return apply(reference.qkv_attention, qkv, num_heads=num_heads, queries=queries, mask=mask, dropout_mask=keep)


def encoder_block(
    x: Input, *weights: Input, num_heads: int, eps: tuple[float, float], approximate: str = "none"
) -> Tensor:
    """A Vision Transformer's block in one operation, for predictions.

    x + linear(qkv_attention(linear(layer_norm(x)))), then that + mlp(layer_norm(that)).

    Args:
        x: (B, N, D).
        weights: weight and bias of norm, linear (D -> 3 D), linear (D -> D), norm, linear (D -> M), linear (M -> D).
        num_heads: of attention.
        eps: of both norms.
        approximate: as in `gelu`.

    Returns:
        (B, N, D). Raises ValueError where a gradient would be recorded: use it within `no_grad`.
    """
    if recording.get() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *weights)):
        raise ValueError("encoder_block has no gradient: use it within tinyvit.no_grad()")
    checks.encoder_block(x, weights, num_heads)
    checks.approximate(approximate)
    return apply(reference.encoder_block, x, *weights, num_heads=num_heads, eps=eps, approximate=approximate)


def attention_weights(qkv: Input, num_heads: int) -> Tensor:
    """The weights by which `qkv_attention` adds up the values: softmax(q k^T / sqrt(D)).

    Args:
        qkv, num_heads: as in `qkv_attention`.

    Returns:
        (B, num_heads, N, N); each row of the last axis sums to 1.
    """
    checks.heads(qkv, num_heads)
    batch, tokens, width = qkv.shape
    dim = width // (3 * num_heads)
    parts = tensor_of(qkv).reshape(batch, tokens, 3, num_heads, dim)
    q, k = (parts[:, :, i, :, :].permute_dims(0, 2, 1, 3) for i in (0, 1))  # (B, H, N, D)
    return softmax((q * dim**-0.5) @ k.transpose())


# --- images ---------------------------------------------------------------------------------------------------------


def patchify(images: Input, patch_size: int | Pair) -> Tensor:
    """Cut images into patches, row by row.

    Args:
        images: (B, C, H, W).
        patch_size: (h, w), or one number for both, with h dividing H and w dividing W.

    Returns:
        (B, (H / h)(W / w), C h w).
    """
    checks.patches(images, patch_size)
    return apply(reference.patchify, images, patch_size=checks.pair("patch_size", patch_size, 1))


def patch_embed(images: Input, weight: Input, bias: Input | None = None) -> Tensor:
    """A convolution whose stride is its kernel, as one product of matrices (Dosovitskiy et al. 2020, arXiv:2010.11929).

    Args:
        images: (B, C, H, W).
        weight: (embed_dim, C, h, w) with h dividing H and w dividing W.
        bias: (embed_dim,) or None.

    Returns:
        (B, (H / h)(W / w), embed_dim), patches row by row.
    """
    checks.conv2d("patch_embed", images, weight, bias)
    dim, _, h, w = weight.shape
    return linear(patchify(images, (h, w)), tensor_of(weight).reshape(dim, -1), bias)


def conv2d(
    x: Input, weight: Input, bias: Input | None = None, stride: int | Pair = 1, padding: int | Pair | str = 0
) -> Tensor:
    """A convolution in deep learning's sense (cross-correlation).

    Args:
        x: (B, C, H, W).
        weight: (O, C, h, w).
        bias: (O,) or None.
        stride: pixels from one window to the next, one number or (down, right).
        padding: zeros around the image, one number or (above and below, left and right). "same" pads such that there
            are ceil(H / stride) x ceil(W / stride) windows, the odd pixel below and right: torch's rule, which it has
            for a stride of 1 only, and TensorFlow's.

    Returns:
        (B, O, R, S), R = (H + padding above and below - h) // stride + 1 and S likewise.
    """
    checks.conv2d("conv2d", x, weight, bias)
    steps, pads = checks.windows("conv2d", x, weight.shape[2:], stride, padding)
    y = apply(reference.conv2d, x, weight, stride=steps, padding=pads)
    return y if bias is None else y + tensor_of(bias).reshape(-1, 1, 1)


def max_pool2d(
    x: Input, kernel_size: int | Pair, stride: int | Pair | None = None, padding: int | Pair | str = 0
) -> Tensor:
    """The largest entry of each window.

    Args:
        x: (B, C, H, W).
        kernel_size: of a window, one number or (height, width).
        stride: as in `conv2d`; `kernel_size` if None.
        padding: as in `conv2d`, less than the kernel; padded places never are the largest.

    Returns:
        (B, C, R, S), R and S as in `conv2d`.
    """
    if len(checks.shape(x)) != 4:
        raise ValueError(f"max_pool2d expects x (B, C, H, W), got {checks.shape(x)}")
    kernel = checks.pair("kernel_size", kernel_size, 1)
    steps, pads = checks.windows("max_pool2d", x, kernel, kernel if stride is None else stride, padding)
    if any(max(sides) >= k for sides, k in zip(pads, kernel, strict=True)):
        raise ValueError(f"max_pool2d expects less padding than its kernel {kernel}, got {pads}")
    return apply(reference.max_pool2d, x, kernel=kernel, stride=steps, padding=pads)


# --- dropout --------------------------------------------------------------------------------------------------------


def dropout(x: Input, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero entries with probability p and divide the others by 1 - p (Srivastava et al. 2014).

    Args:
        x: (B, ...).
        p: from 0 to 1.
        training: with False x stays as it is.
    """
    if not checks.shape(x):
        return dropout(tensor_of(x).reshape(1), p, training).reshape(())
    mask = _dropout_mask(x, p, training, checks.shape(x)[1:])
    return tensor_of(x) if mask is None else multiply(x, mask)


def drop_path(x: Input, p: float, training: bool) -> Tensor:
    """Zero whole samples with probability p and divide the others by 1 - p (Huang et al. 2016, arXiv:1603.09382).

    Args:
        x: (B, ...).
        p: from 0 to 1.
        training: with False x stays as it is; there is no default, since timm's is False and dropout's is True.
    """
    mask = _dropout_mask(x, p, training, (1,) * (len(checks.shape(x)) - 1))
    return tensor_of(x) if mask is None else multiply(x, mask)


def add_drop_path(residual: Input, x: Input, p: float, training: bool) -> Tensor:
    """residual + drop_path(x, p, training) in one operation. residual and x (B, ..., D)."""
    if checks.shape(residual) != checks.shape(x):
        raise ValueError(f"add_drop_path expects arrays of one shape, got {checks.shape(residual)}, {checks.shape(x)}")
    mask = _dropout_mask(x, p, training, (1,) * (len(checks.shape(x)) - 1))
    return tensor_of(residual) + x if mask is None else apply(reference.add_scaled, residual, x, scale=mask)


def _dropout_mask(x: Input, p: float, training: bool, shape: Shape) -> Array | None:
    """0 or 1 / (1 - p) for (B, *shape), of x's dtype and library, on its device; None where nothing is dropped."""
    checks.probability(p)
    if not training or p == 0.0:
        return None
    like = array_of(x)
    xp = arrays.namespace(like)
    return kernels.best(reference.dropout_mask, xp)(xp, like, drop=p, shape=shape, draw=random.draw())


def tensor_of(x: Input) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)
