"""The checks of the operations' arguments. Each raises TypeError or ValueError: what was given, what is expected."""

from __future__ import annotations

from collections.abc import Sequence

from tinyvit.backend import arrays
from tinyvit.engine.tensor import Array, Tensor
from tinyvit.kernels import reference

Input = Tensor | Array
Shape = tuple[int, ...]
Pair = tuple[int, int]


def shape(x: Input) -> Shape:
    """The shape of a tensor or an array."""
    try:
        return tuple(x.shape)
    except AttributeError:
        raise TypeError(f"expected a Tensor or an array, got {type(x).__name__}; use numpy.asarray") from None


def constant(name: str, x: Input) -> Array:
    """The array of an argument that gets no gradient."""
    if isinstance(x, Tensor):
        if x.requires_grad:
            raise ValueError(f"{name} must not require a gradient, for none would reach it; pass x.detach()")
        return x.data
    if not arrays.is_array(x):
        raise TypeError(f"{name} must be an array or a Tensor, got {type(x).__name__}; use numpy.asarray")
    return x


def linear(x: Input, weight: Input, bias: Input | None) -> None:
    given, matrix = shape(x), shape(weight)
    if len(matrix) != 2 or not given or given[-1] != matrix[1] or not matrix[1]:
        raise ValueError(f"linear expects x (..., in) and weight (out, in), got {given} and {matrix}")
    if bias is not None and shape(bias) != matrix[:1]:
        raise ValueError(f"linear expects a bias of shape ({matrix[0]},), got {shape(bias)}")


def residual(name: str, given: Input, x: Input, weight: Input) -> None:
    expected = (*shape(x)[:-1], shape(weight)[0])
    if shape(given) != expected:
        raise ValueError(f"{name} expects residual {expected}, got {shape(given)}")


def second_linear(weight1: Input, weight2: Input, bias2: Input) -> None:
    hidden, matrix, bias = shape(weight1)[0], shape(weight2), shape(bias2)
    if len(matrix) != 2 or matrix[1] != hidden or not hidden or bias != matrix[:1]:
        raise ValueError(f"mlp expects weight2 (out, {hidden or 'hidden'}) and bias2 (out,), got {matrix} and {bias}")


def layer_norm(x: Input, weight: Input, bias: Input) -> None:
    if not shape(x) or not shape(weight) == shape(bias) == shape(x)[-1:]:
        given = f"{shape(x)}, {shape(weight)} and {shape(bias)}"
        raise ValueError(f"layer_norm expects x (..., D), weight and bias (D,), got {given}")


def no_normalized_shape(call: str, weight: object) -> None:
    if isinstance(weight, (tuple, list)):
        raise TypeError(f"unlike torch's it takes no normalized_shape, got {weight}: {call} normalises the last axis")


def group_norm(x: Input, num_groups: int, weight: Input, bias: Input) -> None:
    if len(shape(x)) != 4 or not shape(weight) == shape(bias) == shape(x)[1:2]:
        given = f"{shape(x)}, {shape(weight)} and {shape(bias)}"
        raise ValueError(f"group_norm expects x (B, C, H, W), weight and bias (C,), got {given}")
    channels = shape(x)[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm expects groups of equal size, got {channels} channels and {num_groups} groups")


def approximate(value: str) -> None:
    if value not in ("none", "tanh"):
        raise ValueError(f'gelu expects approximate "none" or "tanh", got {value!r}')


def probability(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a dropout probability must lie in 0 ... 1, got {p}")


def attention(q: Input, k: Input, v: Input) -> None:
    a, b, c = shape(q), shape(k), shape(v)
    good = len(a) == len(b) == len(c) == 4 and a[:2] == b[:2] == c[:2]
    if not (good and a[3] == b[3] > 0 and b[2] == c[2]):
        raise ValueError(f"attention expects q (B, H, N, D), k (B, H, M, D) and v (B, H, M, E), got {a}, {b} and {c}")


def heads(qkv: Input, num_heads: int) -> None:
    given = shape(qkv)
    if len(given) != 3 or num_heads < 1 or not given[2] or given[2] % (3 * num_heads):
        raise ValueError(f"qkv_attention expects (B, N, 3 * num_heads * D), got {given} with {num_heads} heads")


def encoder_block(x: Input, weights: Sequence[Input], num_heads: int) -> None:
    given, found = shape(x), [shape(w) for w in weights]
    if len(found) != 12:
        raise ValueError(f"encoder_block expects 12 weights, got {len(found)}")
    dim, hidden = given[-1] if given else 0, found[9][0] if found[9] else 0
    half = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    expected = [*half, (dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,)]
    if len(given) != 3 or found != expected or not hidden or num_heads < 1 or not dim or dim % num_heads:
        wanted = f"x (B, N, D) and weights {', '.join(map(str, expected))}"
        got = f"{given} and {', '.join(map(str, found))} with {num_heads} heads"
        raise ValueError(f"encoder_block expects {wanted}, got {got}")


def attention_mask(mask: Input | None, x: Array, scores: Shape) -> Array | None:
    """The mask in the library of `x`, for scores of this shape."""
    if mask is None:
        return None
    mask = arrays.convert(constant("an attention mask", mask), x)
    if mask.dtype != x.dtype and not arrays.namespace(mask).isdtype(mask.dtype, "bool"):
        raise TypeError(f"attention expects a mask of booleans or of dtype {x.dtype}, got {mask.dtype}")
    sides = zip(reversed(shape(mask)), reversed(scores), strict=False)
    if mask.ndim > len(scores) or any(n not in (1, m) for n, m in sides):
        raise ValueError(f"attention expects a mask that broadcasts to {scores}, got {shape(mask)}")
    return mask


def patches(images: Input, patch_size: int | Pair) -> None:
    if len(shape(images)) != 4:
        raise ValueError(f"expected images (B, C, H, W), got shape {shape(images)}")
    (height, width), (h, w) = shape(images)[2:], pair("patch_size", patch_size, 1)
    if height % h or width % w:
        patch = f"{h}" if h == w else f"{h}x{w}"
        raise ValueError(f"image size {height}x{width} is not divisible by patch size {patch}")


def conv2d(name: str, x: Input, weight: Input, bias: Input | None) -> None:
    a, b = shape(x), shape(weight)
    if len(a) != 4 or len(b) != 4 or a[1] != b[1]:
        raise ValueError(f"{name} expects images (B, C, H, W) and weight (O, C, h, w), got {a} and {b}")
    if bias is not None and shape(bias) != b[:1]:
        raise ValueError(f"{name} expects a bias of shape ({b[0]},), got {shape(bias)}")


def pair(name: str, value: int | Pair, least: int) -> Pair:
    """One whole number, or two of them, as two."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(isinstance(n, int) and n >= least for n in both):
        raise ValueError(f"{name} must be a whole number of at least {least}, or two of them, got {value!r}")
    return both


def windows(
    name: str, x: Input, kernel: Shape, stride: int | Pair, padding: int | Pair | str
) -> tuple[Pair, reference.Padding]:
    """The stride as (down, right) and the padding as ((top, bottom), (left, right)) of windows over x (B, C, H, W)."""
    (h, w), (height, width) = kernel, shape(x)[2:]
    size, steps = (height, width), pair("stride", stride, 1)
    if padding == "same":
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, (h, w), steps, strict=True)]
        rows, columns = ((total // 2, total - total // 2) for total in totals)
    elif isinstance(padding, str):
        raise ValueError(f'padding must be "same", a whole number of at least 0, or two of them, got {padding!r}')
    else:
        rows, columns = ((n, n) for n in pair("padding", padding, 0))
    if min(h, w, *size, *reference.output_size(size, (h, w), steps, (rows, columns))) < 1:
        raise ValueError(f"{name} finds no place for a kernel {(h, w)} in {size} with padding {(rows, columns)}")
    return steps, (rows, columns)


def targets(logits: Input, labels: Input, like: Array) -> Array:
    """The labels of `cross_entropy` in the library of `like`: class numbers as int64, or probabilities."""
    given = shape(logits)
    if len(given) != 2 or not given[0] or not given[1]:
        raise ValueError(f"cross_entropy expects logits (B, C) with at least one entry, got {given}")
    batch, classes = given
    labels = arrays.convert(constant("labels", labels), like)
    numbers = not arrays.is_floating(labels)
    if shape(labels) != ((batch,) if numbers else given):
        raise ValueError(
            f"cross_entropy expects class numbers ({batch},) or probabilities {given}, "
            f"got {labels.dtype} labels of shape {shape(labels)}"
        )
    if not numbers:
        if labels.dtype != like.dtype:
            raise TypeError(f"cross_entropy expects probabilities of dtype {like.dtype}, got {labels.dtype}")
        return labels
    return class_numbers(labels, classes)


def class_numbers(labels: Array, classes: int) -> Array:
    """Labels as int64: class numbers may not fit their own dtype. On a device nothing is read to check them."""
    labels = arrays.astype(labels, "int64")
    if arrays.on_host(labels) and ((labels < 0).any() or (labels >= classes).any()):
        raise ValueError(f"labels must lie in 0 ... {classes - 1}, got {int(labels.min())} ... {int(labels.max())}")
    return labels
