"""The ViT's operations on Tensors.

Each checks what it was given and runs the fastest kernel there is for the array library; what is computed is
defined in `tinyvit.kernels.reference`. Arrays are accepted wherever Tensors are; no operation writes into its inputs.
"""

from __future__ import annotations

from tinyvit import kernels
from tinyvit.backend import arrays, random
from tinyvit.engine.ops import multiply
from tinyvit.engine.tensor import Array, Tensor, apply
from tinyvit.kernels import reference

__all__ = [
    "attention",
    "attention_weights",
    "conv2d",
    "cross_entropy",
    "drop_path",
    "dropout",
    "gelu",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_gelu",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "patch_embed",
    "patchify",
    "qkv_attention",
    "relu",
    "softmax",
    "weight_standardize",
    "weighted_targets",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b on the last axis.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features).
    """
    _check_linear(x, weight, bias)
    return apply(reference.linear, x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """gelu(linear(x, weight, bias), approximate) in one operation: the first half of an MLP."""
    _check_linear(x, weight, bias)
    _check_approximate(approximate)
    return apply(reference.linear_gelu, x, weight, bias, approximate=approximate)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450).

    (x - mean) / sqrt(var + eps) * weight + bias with x (..., D), weight and bias (D,); returns (..., D).
    """
    _check_norm(x, weight, bias)
    return apply(reference.layer_norm, x, weight, bias, eps=eps)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit x Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415), elementwise.

    Args:
        x: any shape.
        approximate: "none" for the exact function (erf), "tanh" for 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    """
    _check_approximate(approximate)
    return apply(reference.gelu, x, approximate=approximate)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along `axis`, computed without overflow."""
    return apply(reference.softmax, x, axis=axis)


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """log(softmax(x)) along `axis`, computed without overflow."""
    return apply(reference.log_softmax, x, axis=axis)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Array | None = None, dropout: float = 0.0, training: bool = True
) -> Tensor:
    """Scaled dot-product attention softmax(q k^T / sqrt(D) + mask) v (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        q: queries (B, H, N, D).
        k: keys (B, H, M, D).
        v: values (B, H, M, E).
        mask: broadcastable to (B, H, N, M): booleans (True: may look) or numbers of q's dtype, added to the scores.
            No gradient goes to it.
        dropout: probability of zeroing an attention weight while `training`.

    Returns:
        (B, H, N, E); zeros for a query that may look nowhere.
    """
    good = len(q.shape) == len(k.shape) == len(v.shape) == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    if not (good and q.shape[3] == k.shape[3] > 0 and k.shape[2] == v.shape[2]):
        raise ValueError(
            f"attention expects q (B, H, N, D), k (B, H, M, D) and v (B, H, M, E), got {_s(q)}, {_s(k)} and {_s(v)}"
        )
    scores = (q.shape[1], q.shape[2], k.shape[2])
    keep = _keep(q, dropout, training, scores)
    return apply(reference.attention, q, k, v, mask=_mask(mask, q, scores), keep=keep)


def qkv_attention(
    qkv: Tensor,
    num_heads: int,
    mask: Array | None = None,
    dropout: float = 0.0,
    training: bool = True,
    queries: int | None = None,
) -> Tensor:
    """Multi-head self-attention on queries, keys and values packed by one linear layer.

    Args:
        qkv: (B, N, 3 * num_heads * D): queries of all heads, then keys, then values.
        num_heads: H.
        mask, dropout, training: as in `attention`.
        queries: how many of the first tokens ask (Q); all N if None.

    Returns:
        (B, Q, num_heads * D), heads side by side.
    """
    _check_heads(qkv, num_heads)
    if queries is not None and not 0 < queries <= qkv.shape[1]:
        raise ValueError(f"queries must lie in 1 ... {qkv.shape[1]} tokens, got {queries}")
    scores = (num_heads, queries or qkv.shape[1], qkv.shape[1])
    keep, mask = _keep(qkv, dropout, training, scores), _mask(mask, qkv, scores)
    return apply(reference.qkv_attention, qkv, num_heads=num_heads, queries=queries, mask=mask, keep=keep)


def attention_weights(qkv: Tensor, num_heads: int) -> Tensor:
    """The weights by which `qkv_attention` adds up the values: softmax(q k^T / sqrt(D)).

    Args:
        qkv, num_heads: as in `qkv_attention`.

    Returns:
        (B, num_heads, N, N); each row of the last axis sums to 1.
    """
    _check_heads(qkv, num_heads)
    batch, tokens, width = qkv.shape
    dim = width // (3 * num_heads)
    parts = _tensor(qkv).reshape(batch, tokens, 3, num_heads, dim)
    q, k = (parts[:, :, i, :, :].permute_dims(0, 2, 1, 3) for i in (0, 1))  # (B, H, N, D)
    return softmax((q * dim**-0.5) @ k.transpose())


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row: (B, C, H, W) -> (B, (H / h)(W / w), C h w).

    Raises:
        ValueError: an image's height or width is not a multiple of the patch's.
    """
    h, w = patch_size
    if len(images.shape) != 4:
        raise ValueError(f"expected images (B, C, H, W), got shape {_s(images)}")
    if images.shape[2] % h or images.shape[3] % w:
        patch = f"{h}" if h == w else f"{h}x{w}"
        raise ValueError(f"image size {images.shape[2]}x{images.shape[3]} is not divisible by patch size {patch}")
    return apply(reference.patchify, images, patch_size=(h, w))


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution whose stride is its kernel, as one product of matrices (Dosovitskiy et al. 2020, arXiv:2010.11929).

    Args:
        images: (B, C, H, W).
        weight: (embed_dim, C, h, w) with h dividing H and w dividing W.
        bias: (embed_dim,) or None.

    Returns:
        (B, (H / h)(W / w), embed_dim), patches row by row.
    """
    if len(weight.shape) != 4 or len(images.shape) != 4 or images.shape[1] != weight.shape[1]:
        raise ValueError(
            f"patch_embed expects images (B, C, H, W) and weight (D, C, h, w), got {_s(images)} and {_s(weight)}"
        )
    patches = patchify(images, (weight.shape[2], weight.shape[3]))
    return linear(patches, _tensor(weight).reshape(weight.shape[0], -1), bias)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
) -> Tensor:
    """A convolution in deep learning's sense (cross-correlation).

    Args:
        x: (B, C, H, W).
        weight: (O, C, h, w).
        bias: (O,) or None.
        stride: pixels from one window to the next, one number or (down, right).
        padding: zeros around the image, one number or (above and below, left and right). "same" pads such that there
            are ceil(H / stride) x ceil(W / stride) windows, the odd pixel below and right: torch's rule, which there is
            for a stride of 1 only, and TensorFlow's.

    Returns:
        (B, O, R, S), R = (H + padding above and below - h) // stride + 1 and S likewise.
    """
    if len(x.shape) != 4 or len(weight.shape) != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"conv2d expects x (B, C, H, W) and weight (O, C, h, w), got {_s(x)} and {_s(weight)}")
    if bias is not None and _s(bias) != (weight.shape[0],):
        raise ValueError(f"conv2d expects a bias of shape ({weight.shape[0]},), got {_s(bias)}")
    stride, padding = _windows("conv2d", x, tuple(weight.shape[2:]), stride, padding)
    y = apply(reference.conv2d, x, weight, stride=stride, padding=padding)
    return y if bias is None else y + _tensor(bias).reshape(-1, 1, 1)


def max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] | str = 0,
) -> Tensor:
    """The largest entry of each window of x (B, C, H, W).

    `kernel_size` is one number or (height, width). `stride` is `kernel_size` if None; it, `padding` and the result are
    as in `conv2d`.
    """
    if len(x.shape) != 4:
        raise ValueError(f"max_pool2d expects x (B, C, H, W), got {_s(x)}")
    kernel = _two("kernel_size", kernel_size, 1)
    stride, padding = _windows("max_pool2d", x, kernel, kernel if stride is None else stride, padding)
    if any(max(pads) >= k for pads, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"max_pool2d expects less padding than its kernel {kernel}, got {padding}")
    return apply(reference.max_pool2d, x, kernel=kernel, stride=stride, padding=padding)


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Group normalisation (Wu & He 2018, arXiv:1803.08494).

    Each sample's C channels make `num_groups` groups; (x - mean) / sqrt(var + eps) over group, height and width, then
    * weight + bias by channel. x (B, C, H, W), weight and bias (C,); returns (B, C, H, W).
    """
    if len(x.shape) != 4 or not _s(weight) == _s(bias) == (x.shape[1],):
        given = f"{_s(x)}, {_s(weight)} and {_s(bias)}"
        raise ValueError(f"group_norm expects x (B, C, H, W), weight and bias (C,), got {given}")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"group_norm expects groups of equal size, got {x.shape[1]} channels and {num_groups} groups")
    return apply(reference.group_norm, x, weight, bias, num_groups=num_groups, eps=eps)


def weight_standardize(weight: Tensor, eps: float = 1e-8) -> Tensor:
    """Weight standardization (Qiao et al. 2019, arXiv:1903.10520).

    (w - mean) / sqrt(var + eps) over each output's weights; weight (O, C, h, w), returns the same shape.
    """
    if len(weight.shape) != 4:
        raise ValueError(f"weight_standardize expects weight (O, C, h, w), got {_s(weight)}")
    return apply(reference.weight_standardize, weight, eps=eps)


def relu(x: Tensor) -> Tensor:
    """x where it is positive, else 0, elementwise; its gradient at 0 is 0."""
    return apply(reference.relu, x)


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero entries with probability p and divide the others by 1 - p (Srivastava et al. 2014). x (B, ...)."""
    keep = _keep(x, p, training, tuple(x.shape[1:]))
    return _tensor(x) if keep is None else multiply(x, keep)


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero whole samples with probability p and divide the others by 1 - p (Huang et al. 2016, arXiv:1603.09382)."""
    keep = _keep(x, p, training, (1,) * (len(x.shape) - 1))
    return _tensor(x) if keep is None else multiply(x, keep)


def cross_entropy(
    logits: Tensor, labels: Array | Tensor, *, weight: Array | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy over a batch, stable for any finite logits.

    Args:
        logits: (B, C).
        labels: class numbers (B,), or probabilities (B, C) of the logits' dtype; no gradient goes to them.
        label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016).
        weight: (C,), what each class counts for; see `weighted_targets`.

    Returns:
        a tensor without dimensions.
    """
    labels = _constant("labels", labels)
    if len(logits.shape) != 2 or logits.shape[0] == 0 or logits.shape[1] == 0:
        raise ValueError(f"cross_entropy expects logits (B, C) with at least one entry, got {_s(logits)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in 0 ... 1, got {label_smoothing}")
    labels = arrays.convert(labels, _array(logits))
    whole = not arrays.is_floating(labels)
    if tuple(labels.shape) != (tuple(logits.shape[:1]) if whole else tuple(logits.shape)):
        raise ValueError(
            f"cross_entropy expects class numbers ({logits.shape[0]},) or probabilities {_s(logits)}, "
            f"got {labels.dtype} labels of shape {_s(labels)}"
        )
    if not whole and labels.dtype != logits.dtype:
        raise TypeError(f"cross_entropy expects probabilities of dtype {logits.dtype}, got {labels.dtype}")
    if whole:  # class numbers may not fit the labels' own dtype
        labels = arrays.astype(labels, "int64")
    if whole and arrays.on_host(labels) and ((labels < 0).any() or (labels >= logits.shape[1]).any()):
        raise ValueError(
            f"labels must lie in 0 ... {logits.shape[1] - 1}, got {int(labels.min())} ... {int(labels.max())}"
        )
    if weight is not None and tuple(weight.shape) != (logits.shape[1],):
        raise ValueError(
            f"cross_entropy expects one weight for each of {logits.shape[1]} classes, got shape {_s(weight)}"
        )
    if weight is not None:
        labels, label_smoothing = weighted_targets(labels, weight, label_smoothing, like=_array(logits)), 0.0
    return apply(reference.cross_entropy, logits, labels=labels, label_smoothing=label_smoothing)


def mse_loss(x: Tensor, target: Tensor | Array) -> Tensor:
    """The mean of (x - target)^2 over all entries; x and target of one shape."""
    if _s(x) != _s(target):
        raise ValueError(f"mse_loss expects x and target of one shape, got {_s(x)} and {_s(target)}")
    difference = _tensor(x) - target
    return (difference * difference).mean()


def weighted_targets(labels: Array, weight: Array, label_smoothing: float = 0.0, *, like: Array) -> Array:
    """Targets whose plain cross-entropy is that of `labels` with weighted classes, as torch's CrossEntropyLoss has it.

    The smoothed target of each class is multiplied by the class's weight. A mean over class numbers is divided by the
    sum of their weights, and one over probabilities (of mixup, say) by the number of samples, weighted or not. As the
    division is by the whole batch's sum, parts of the targets are those of the parts of a batch.

    Args:
        labels: class numbers (B,) or probabilities (B, C).
        weight: (C,).
        label_smoothing: as in `cross_entropy`.
        like: an array of the dtype and library that the targets are to have.

    Returns:
        (B, C); their rows do not add up to 1.
    """
    xp, classes = arrays.namespace(like), weight.shape[0]
    weight = arrays.astype(arrays.convert(weight, like), like.dtype)
    labels = arrays.convert(labels, like)
    whole = labels.ndim == 1
    if whole:
        labels = arrays.astype(labels, "int64")[:, None] == xp.arange(classes, dtype=xp.int64, device=labels.device)
    labels = arrays.astype(labels, like.dtype)
    counted = xp.sum(labels * weight) if whole else labels.shape[0]
    smoothed = labels * (1.0 - label_smoothing) + label_smoothing / classes
    return smoothed * (weight * (labels.shape[0] / counted))


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if len(weight.shape) != 2 or len(x.shape) < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear expects x (..., in) and weight (out, in), got {_s(x)} and {_s(weight)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"linear expects a bias of shape ({weight.shape[0]},), got {_s(bias)}")


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if len(x.shape) < 1 or not _s(weight) == _s(bias) == (x.shape[-1],):
        given = f"{_s(x)}, {_s(weight)} and {_s(bias)}"
        raise ValueError(f"layer_norm expects x (..., D), weight and bias (D,), got {given}")


def _check_heads(qkv: Tensor, num_heads: int) -> None:
    if len(qkv.shape) != 3 or num_heads < 1 or not qkv.shape[2] or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv_attention expects (B, N, 3 * num_heads * D), got {_s(qkv)} with {num_heads} heads")


def _windows(
    name: str, x: Tensor, kernel: tuple[int, int], stride: int | tuple[int, int], padding: int | tuple[int, int] | str
) -> tuple[tuple[int, int], reference.Padding]:
    """Stride and padding, spelt out: (down, right) and ((top, bottom), (left, right))."""
    size, stride = tuple(x.shape[2:]), _two("stride", stride, 1)
    if padding == "same":
        totals = (max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, kernel, stride, strict=True))
        top, left = ((total // 2, total - total // 2) for total in totals)
    else:
        top, left = ((pad, pad) for pad in _two("padding", padding, 0))
    if min(size + kernel + reference.output_size(size, kernel, stride, (top, left))) < 1:
        raise ValueError(f"{name} finds no place for a kernel {kernel} in {size} with padding {(top, left)}")
    return stride, (top, left)


def _two(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"{name} must be a whole number of at least {least}, or two of them, got {value!r}")
    return pair


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f'gelu expects approximate "none" or "tanh", got {approximate!r}')


def _keep(x: Tensor | Array, p: float, training: bool, shape: tuple[int, ...]) -> Array | None:
    """A dropout mask for (B, *shape), 0 or 1 / (1 - p) of x's dtype and library, where x lies; None for no dropout."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a dropout probability must lie in 0 ... 1, got {p}")
    if not training or p == 0.0:
        return None
    x = _array(x)
    xp = arrays.namespace(x)
    return kernels.best(reference.dropout_mask, xp)(xp, x, drop=p, shape=shape, draw=random.draw())


def _mask(mask: Tensor | Array | None, x: Tensor | Array, scores: tuple[int, ...]) -> Array | None:
    """An attention mask in the library of `x`, for scores of shape (B, *scores)."""
    if mask is None:
        return None
    x = _array(x)
    mask = arrays.convert(_constant("an attention mask", mask), x)
    if mask.dtype != x.dtype and not arrays.namespace(mask).isdtype(mask.dtype, "bool"):
        raise TypeError(f"attention expects a mask of booleans or of dtype {x.dtype}, got {mask.dtype}")
    full = (x.shape[0], *scores)
    if mask.ndim > 4 or any(n not in (1, m) for n, m in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise ValueError(f"attention expects a mask that broadcasts to {full}, got {_s(mask)}")
    return mask


def _array(x: Tensor | Array | None) -> Array | None:
    return x.data if isinstance(x, Tensor) else x


def _constant(what: str, x: Tensor | Array) -> Array:
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{what} must not require a gradient, for none would reach it; pass x.detach()")
    return _array(x)


def _tensor(x: Tensor | Array) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)


def _s(x: Tensor | Array) -> tuple[int, ...]:
    return tuple(x.shape)
