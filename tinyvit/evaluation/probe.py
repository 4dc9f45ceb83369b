"""How good a model's features are for other images: nearest neighbours and a linear classifier on frozen features."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit.data.splits import draw_share
from tinyvit.distributed import ALONE, Group
from tinyvit.distributed.group import SLOW
from tinyvit.evaluation.features import with_features
from tinyvit.evaluation.metrics import EvaluationError, Scores, cross_entropies, measure
from tinyvit.models.inspection import Features

if TYPE_CHECKING:
    from tinyvit.checkpoints.checkpoint import Checkpoint
    from tinyvit.data import Data
    from tinyvit.models.vit import VisionTransformer

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's
PENALTIES = tuple(10.0**-i for i in range(7))  # from strong to weak, so that each fit begins where the last one ended
HELD_OUT = 0.2  # share of the training images by which the penalty is chosen
MEMORY = 1 << 26  # bytes of similarities that are computed at a time


def probe(
    kind: str,
    checkpoint: Checkpoint,
    model: VisionTransformer,
    data: Data,
    precision: str = "fp32",
    group: Group = ALONE,
) -> tuple[Scores, dict[str, float]]:
    """Features of both splits, a classifier on the training split's, and how well it does on the test split.

    Args:
        kind: "knn", which gives no probabilities and so no loss, or "linear".
        data: of any classes; read with the checkpoint's size and fit options.
        precision: as for `inference.predict`.
        group: the processes that share the images.

    Returns:
        scores in the data set's own classes, and the classifier's setting (k or l2).
    """
    mean, std = checkpoint.preprocessing.statistics
    data = dataclasses.replace(data, mean=mean, std=std, val=data.test)
    seen = with_features(Features(model), data, precision=precision, group=group)
    measured, setting = group.from_first(_classified(kind, seen, data) if group.leads else None, SLOW)
    return Scores(data.class_names, data.test.labels, measured, probabilities=kind != "knn"), setting


def _classified(kind: str, seen: Data, data: Data) -> tuple[np.ndarray, dict[str, float]]:
    """What `measure` says of a classifier on the features `seen` of the test images of `data`; and its setting."""
    splits: Any = (seen.train, seen.validation)  # FeatureSplits
    train, test = (split.images.astype(np.float32) for split in splits)  # (N, D), (M, D)
    if not (np.all(np.isfinite(train)) and np.all(np.isfinite(test))):
        raise EvaluationError("the model's outputs are not finite")
    labels, classes = data.test.labels, len(data.class_names)
    if kind == "knn":
        k = min(NEIGHBOURS, len(train))
        return measure(nearest_neighbours(train, seen.train.labels, test, classes, k=k), labels), {"k": k}
    logits, l2 = linear(train, seen.train.labels, test, classes)
    return measure(logits, labels), {"l2": l2}


def nearest_neighbours(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    num_classes: int,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """Votes (M, num_classes) for test features (M, D) by their `k` nearest of the train features (N, D).

    Near is by the cosine; a neighbour's vote weighs exp(cosine / temperature) (Caron et al. 2021, arXiv:2104.14294,
    after Wu et al. 2018, arXiv:1805.01978).
    """
    train, test = unit_length(train), unit_length(test)
    votes = np.zeros((len(test), num_classes))
    step = max(1, MEMORY // (train.itemsize * len(train)))
    for start in range(0, len(test), step):
        cosines = test[start : start + step] @ train.T  # (m, N)
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1).astype(np.float64) / temperature)
        rows = start + np.arange(len(cosines))[:, None]
        np.add.at(votes, (rows, labels[nearest]), weights)
    return votes


def unit_length(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(features.dtype).tiny)


def linear(train: np.ndarray, labels: np.ndarray, test: np.ndarray, num_classes: int) -> tuple[np.ndarray, float]:
    """Logits (M, num_classes) float64 of a linear classifier for test features (M, D), and the penalty of its fit.

    Multinomial logistic regression on train features (N, D), each scaled to mean 0 and variance 1. The L2 penalty is
    the one of PENALTIES with the least loss on a part that is held out, as far as weaker ones bring less; the fit is
    then repeated with all.
    """
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1), std, 1)
    train, test = (((x - mean) / scale).astype(train.dtype) for x in (train, test))
    held_out = draw_share(labels, HELD_OUT, seed=0)
    fitted, best, l2 = None, np.inf, PENALTIES[len(PENALTIES) // 2]
    if held_out.any():
        for penalty in PENALTIES:
            fitted = fit_softmax(train[~held_out], labels[~held_out], num_classes, penalty, fitted)
            loss = cross_entropies(logits_of(train[held_out], fitted), labels[held_out]).mean()
            if loss >= best:  # a weaker one would be worse still
                break
            best, l2 = loss, penalty
    return logits_of(test, fit_softmax(train, labels, num_classes, l2)), l2


def logits_of(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """x (N, D) and weights (D + 1, K), the last row the biases -> (N, K) float64."""
    return (x @ weights[:-1].astype(x.dtype)).astype(np.float64) + weights[-1]


def fit_softmax(
    x: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    l2: float,
    start: np.ndarray | None = None,
    tolerance: float = 1e-4,
) -> np.ndarray:
    """Weights (D + 1, num_classes) float64, the last row the biases, with the least penalised loss on x (N, D).

    The loss is the mean cross-entropy + l2 / 2 times the sum of squares of all weights but the biases; its gradient
    ends within `tolerance` of zero. The search begins at `start`, else at zeros.
    """
    shape = (x.shape[1] + 1, num_classes)
    rows = np.arange(len(x))

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = logits_of(x, weights)
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(axis=1, keepdims=True)
        loss = float(np.mean(np.log(total[:, 0]) - logits[rows, labels])) + l2 / 2 * float((weights[:-1] ** 2).sum())
        p /= total
        p[rows, labels] -= 1
        p /= len(x)
        gradient = np.empty(shape)
        gradient[:-1] = x.T @ p.astype(x.dtype) + l2 * weights[:-1]
        gradient[-1] = p.sum(axis=0)
        return loss, gradient.ravel()

    first = np.zeros(shape) if start is None else start
    return minimise(loss_and_gradient, first.ravel(), tolerance).reshape(shape)


def minimise(
    loss_and_gradient: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray, tolerance: float
) -> np.ndarray:
    """Where a smooth convex function of x (n,) is least: limited-memory BFGS (Nocedal & Wright, algorithm 7.5).

    It ends when no entry of the gradient is above `tolerance`, or when no step along the direction brings less loss.
    """
    loss, gradient = loss_and_gradient(x)
    steps: deque[Any] = deque(maxlen=10)  # the last changes of x and of the gradient, and 1 / their product
    for _ in range(500):
        if np.abs(gradient).max() <= tolerance:
            break
        direction = -inverse_hessian_times(gradient, steps)
        slope, length = float(direction @ gradient), 1.0
        while True:
            new = x + length * direction
            new_loss, new_gradient = loss_and_gradient(new)
            if new_loss <= loss + 1e-4 * length * slope:  # enough less (Armijo)
                break
            length /= 2
            if length < 1e-10:
                return x
        change, bend = new - x, new_gradient - gradient
        if change @ bend > 1e-12 * (bend @ bend):
            steps.append((change, bend, 1 / (change @ bend)))
        x, loss, gradient = new, new_loss, new_gradient
    return x


def inverse_hessian_times(gradient: np.ndarray, steps: deque[Any]) -> np.ndarray:
    """The two loops of L-BFGS (Nocedal & Wright, algorithm 7.4); with no step yet, the gradient cut to length 1."""
    if not steps:
        return gradient / max(1.0, float(np.linalg.norm(gradient)))
    result, shares = gradient.copy(), []
    for change, bend, inverse in reversed(steps):
        share = inverse * (change @ result)
        result -= share * bend
        shares.append(share)
    change, bend, inverse = steps[-1]
    result /= inverse * (bend @ bend)
    for (change, bend, inverse), share in zip(steps, reversed(shares), strict=True):
        result += (share - inverse * (bend @ result)) * change
    return result
