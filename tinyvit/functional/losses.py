"""The losses, and how classes are weighted in them."""

from __future__ import annotations

from numbers import Real

from tinyvit.backend import arrays
from tinyvit.engine.ops import multiply, where
from tinyvit.engine.tensor import Array, Tensor, apply, array_of
from tinyvit.functional import checks
from tinyvit.functional.checks import Input
from tinyvit.functional.layers import log_softmax, tensor_of
from tinyvit.kernels import reference
from tinyvit.kernels.half_precision import half_dtype


def cross_entropy(logits: Input, labels: Input, label_smoothing: float = 0.0, weight: Array | None = None) -> Tensor:
    """Mean cross-entropy over a batch. torch takes `weight` third, which is refused here: pass it by its name.

    Args:
        logits: (B, C).
        labels: class numbers (B,), or probabilities (B, C) of the logits' dtype; no gradient goes to them.
        label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016).
        weight: (C,), the weight of each class; see `weighted_targets`.

    Returns:
        a tensor without dimensions.
    """
    like = array_of(logits)
    targets = checks.targets(logits, labels, like)
    if not isinstance(label_smoothing, Real):
        given = type(label_smoothing).__name__
        raise TypeError(
            f"cross_entropy takes label_smoothing, a number, as its third argument, got {given}: use weight="
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in 0 ... 1, got {label_smoothing}")
    if weight is not None:
        classes = logits.shape[1]
        if checks.shape(weight) != (classes,):
            given = checks.shape(weight)
            raise ValueError(f"cross_entropy expects one weight for each of {classes} classes, got shape {given}")
        if targets.ndim == 1:
            return _weighted_cross_entropy(logits, targets, weight, label_smoothing)
        targets, label_smoothing = weighted_targets(targets, weight, label_smoothing, like=like), 0.0
    return apply(reference.cross_entropy, logits, labels=targets, label_smoothing=label_smoothing)


def _weighted_cross_entropy(logits: Input, labels: Array, weight: Array, label_smoothing: float) -> Tensor:
    """For class numbers: other classes do not count, not even at -inf, which `weighted_targets` cannot say."""
    like = array_of(logits)
    if half_dtype((like,)) is not None:  # a sum of weights needs more than 16 bits
        return _weighted_cross_entropy(tensor_of(logits).astype("float32"), labels, weight, label_smoothing).astype(
            like.dtype
        )
    xp, classes = arrays.namespace(like), weight.shape[0]
    weight = arrays.astype(arrays.convert(weight, like), like.dtype)
    is_label = labels[:, None] == xp.arange(classes, dtype=labels.dtype, device=arrays.device(labels))
    weighted = multiply(log_softmax(logits), weight)
    loss = where(is_label, weighted, 0.0).sum() * (1.0 - label_smoothing)
    if label_smoothing:
        loss = loss + weighted.sum() * (label_smoothing / classes)
    return -loss / xp.sum(xp.where(is_label, weight, xp.zeros_like(weight)))


def mse_loss(x: Input, target: Input) -> Tensor:
    """The mean of (x - target)^2 over all entries; x and target of one shape."""
    if checks.shape(x) != checks.shape(target):
        raise ValueError(f"mse_loss expects x and target of one shape, got {x.shape} and {target.shape}")
    difference = tensor_of(x) - target
    return (difference * difference).mean()


def weighted_targets(labels: Array, weight: Array, label_smoothing: float = 0.0, *, like: Array) -> Array:
    """Targets whose plain cross-entropy is that of `labels` with weighted classes, as in torch's CrossEntropyLoss.

    The smoothed target of each class is multiplied by the class's weight. The mean over class numbers is divided by the
    sum of their weights, that over probabilities (as of mixup) by the number of samples. The divisor belongs to the
    whole batch, so rows of the targets may be used with the same rows of the batch.

    Args:
        labels: class numbers (B,) or probabilities (B, C).
        weight: (C,), the weight of each class.
        label_smoothing: as in `cross_entropy`.
        like: an array of the dtype and library that the targets are to have.

    Returns:
        (B, C); their rows do not add up to 1.
    """
    xp, classes = arrays.namespace(like), weight.shape[0]
    wide = like.dtype if half_dtype((like,)) is None else xp.float32  # a sum of weights needs more than 16 bits
    weight = arrays.astype(arrays.convert(weight, like), wide)
    labels = arrays.convert(labels, like)
    numbers = labels.ndim == 1
    if numbers:
        numbered = checks.class_numbers(labels, classes)
        labels = numbered[:, None] == xp.arange(classes, dtype=xp.int64, device=arrays.device(labels))
    labels = arrays.astype(labels, wide)
    counted = xp.sum(labels * weight) if numbers else labels.shape[0]
    smoothed = labels * (1.0 - label_smoothing) + label_smoothing / classes
    return arrays.astype(smoothed * (weight * (labels.shape[0] / counted)), like.dtype)
