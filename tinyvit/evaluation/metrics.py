"""How good a model is on a data set: accuracy, loss, confusion."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.distributed import ALONE, Group
from tinyvit.distributed.group import SLOW
from tinyvit.files.atomic import atomic_write

if TYPE_CHECKING:
    from tinyvit.checkpoints.checkpoint import Checkpoint
    from tinyvit.data import Data, Split
    from tinyvit.nn import Module

BATCH_SIZE = 256


class EvaluationError(Exception):
    """A model that cannot be run on this data or device; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well a model did: shares in 0..1, the mean cross-entropy, and per class (name, accuracy, images)."""

    accuracy: float
    top5: float
    loss: float | None  # None: what classified gives no probabilities
    per_class: tuple[tuple[str, float | None, int], ...]  # accuracy None: no image of that class
    labels: np.ndarray  # (N,) true classes
    predicted: np.ndarray  # (N,) likeliest classes
    probability: np.ndarray | None  # (N,) of the likeliest classes; None like the loss

    @property
    def images(self) -> int:
        """How many images were measured."""
        return sum(count for _, _, count in self.per_class)


def combined(parts: Sequence[Scores]) -> Scores:
    """The scores of several parts of a data set, which have the same classes, together."""
    images = sum(part.images for part in parts)

    def mean(values: Sequence[float | None]) -> float | None:
        weighted = [value * part.images for value, part in zip(values, parts, strict=True) if value is not None]
        return sum(weighted) / images if len(weighted) == len(parts) else None

    per_class = []
    for same in zip(*(part.per_class for part in parts), strict=True):
        count = sum(n for _, _, n in same)
        hits = sum(accuracy * n for _, accuracy, n in same if accuracy is not None)
        per_class.append((same[0][0], hits / count if count else None, count))
    accuracy, top5 = mean([part.accuracy for part in parts]), mean([part.top5 for part in parts])
    assert accuracy is not None and top5 is not None
    labels, predicted = (np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "predicted"))
    probabilities = [part.probability for part in parts if part.probability is not None]
    probability = np.concatenate(probabilities) if len(probabilities) == len(parts) else None
    loss = mean([part.loss for part in parts])
    return Scores(accuracy, top5, loss, tuple(per_class), labels, predicted, probability)


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often images of each class (rows) were taken for each class (columns): (classes, classes) int64."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def write_confusion(path: Path, scores: Scores) -> None:
    """Write how often images of each class (rows) were taken for each class (columns), as a CSV file."""
    names = [name for name, _, _ in scores.per_class]
    counts = confusion_counts(scores.labels, scores.predicted, len(names))
    _write_csv(
        path, [["true class", *names], *([name, *row] for name, row in zip(names, counts.tolist(), strict=True))]
    )


def write_predictions(path: Path, scores: Scores, images: Sequence[str]) -> None:
    """Write the true class, the predicted one and its probability, if known, of each image as a CSV file.

    `images` are their names.
    """
    names = [name for name, _, _ in scores.per_class]
    columns = [images, [names[k] for k in scores.labels], [names[k] for k in scores.predicted]]
    header = ["image", "true class", "predicted class"]
    if scores.probability is not None:
        columns, header = [*columns, [f"{p:.6f}" for p in scores.probability]], [*header, "probability"]
    _write_csv(path, [header, *zip(*columns, strict=True)])


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with (
        atomic_write(path) as beside,
        open(beside, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file).writerows(rows)


def evaluate(
    model: Module,
    split: Split,
    labels: np.ndarray,
    class_names: Sequence[str],
    transform: Callable[..., Any],
    *,
    threads: int | None = None,
    precision: str = "fp32",
    stop: Callable[[], Any] = lambda: False,
    group: Group = ALONE,
) -> Scores | None:
    """Run `model` over all of `split`, whose images have the classes `labels` (N,) in the model's order.

    The processes of a `group` share the images, and all get the scores of all.

    `transform` is as for `data.Loader`, mostly `Augment(mean, std)`; `threads` and `precision` are as for `predict`.
    Returns None when `stop()` became true on the way. Raises EvaluationError when an output is not finite.
    """
    from tinyvit.data import Loader
    from tinyvit.execution.inference import predictions

    own, mine = share(split, group)
    threads = threads or group.threads
    measured, done, stopped, true = [np.empty((4, 0))], 0, False, labels[mine]
    device = arrays.device_name(model.parameters()[0].data)
    loader = Loader(own, BATCH_SIZE, transform=transform, shuffle=False, device=device)
    batches = (images for images, _ in loader.epoch(0))
    for outputs in predictions(model, batches, threads, precision=precision):
        if stopped := bool(stop()):
            break
        logits = outputs.astype(np.float64)  # (B, K)
        if not np.all(np.isfinite(logits)):
            raise EvaluationError("the model's outputs are not finite")
        measured.append(measure(logits, true[done : done + len(logits)]))
        done += len(logits)
    found = group.exchange(None if stopped else np.concatenate(measured, axis=1), SLOW)
    if any(part is None for part in found):
        return None
    return score(np.concatenate(found, axis=1), labels, class_names)


def share(split: Split, group: Group) -> tuple[Split, slice]:
    """This process's part of `split`, which may be empty, and where it lies."""
    if group.size == 1:
        return split, slice(None)
    first, last = group.part(len(split))
    return split.take(np.arange(first, last)), slice(first, last)


def measure(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each image how many classes come before its true one, its cross-entropy, the likeliest class and that one's
    probability, (4, B), from logits (B, K) in float64."""
    predicted = logits.argmax(axis=1)
    losses, probability = cross_entropies(logits, labels), np.exp(-cross_entropies(logits, predicted))
    return np.stack([ranks(logits, labels), losses, predicted, probability])


def score(
    measured: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, probabilities: bool = True
) -> Scores:
    """The scores of images from what `measure` gives, (4, N), and their labels; without `probabilities` no loss."""
    rank, loss, predicted, probability = measured
    hit = rank == 0
    per_class = []
    for k, name in enumerate(class_names):
        of_class = labels == k
        count = int(of_class.sum())
        per_class.append((name, float(hit[of_class].mean()) if count else None, count))
    return Scores(
        accuracy=float(hit.mean()),
        top5=float((rank < 5).mean()),
        loss=float(loss.mean()) if probabilities else None,
        per_class=tuple(per_class),
        labels=labels,
        predicted=predicted.astype(np.int64),
        probability=probability if probabilities else None,
    )


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before each image's true one (0: it came first), (B,), from logits (B, K).

    Among equal logits the lower class comes first, as with argmax.
    """
    true = np.take_along_axis(logits, labels[:, None], axis=1)  # (B, 1)
    before = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > true) | ((logits == true) & before)).sum(axis=1)


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each image's cross-entropy (B,), from logits (B, K) in float64."""
    highest = logits.max(axis=1)
    true = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1)) - true


def data_for(checkpoint: Checkpoint, source: str, skip_corrupt: bool = False) -> Data:
    """A data set (see `data.load_data`), prepared for a checkpoint and divided as in its run.

    Raises DataError, and EvaluationError where the model takes images of other channels.
    """
    from tinyvit.data import load_data

    data = load_data(
        source,
        image_size=checkpoint.config.image_size,
        skip_corrupt=skip_corrupt,
        fit_options=checkpoint.preprocessing.fit,
        statistics=checkpoint.preprocessing.statistics,
        **checkpoint.split,
    )
    if data.in_chans != (channels := checkpoint.config.in_chans):
        raise EvaluationError(
            f"the model takes images of {channels} channels, those of {data.name} have {data.in_chans}"
        )
    return data


def labels_for(checkpoint: Checkpoint, labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Labels of a data set with `class_names`, counted in the checkpoint's classes. Raises EvaluationError."""
    check_head(checkpoint)
    if tuple(class_names) == checkpoint.class_names:
        return labels
    index = {name: i for i, name in enumerate(checkpoint.class_names)}
    if unknown := [name for name in class_names if name not in index]:
        raise EvaluationError(
            f"the data set's class {unknown[0]!r} is not one of the model's: {', '.join(checkpoint.class_names[:12])}"
            + (", …" if len(index) > 12 else "")
        )
    if several := [name for name in class_names if checkpoint.class_names.count(name) > 1]:
        raise EvaluationError(f"the data set's class {several[0]!r} is the name of several classes of the model")
    return np.array([index[name] for name in class_names], dtype=np.int64)[labels]


def check_head(checkpoint: Checkpoint) -> None:
    """Raises EvaluationError for a model that gives features."""
    if not checkpoint.config.num_classes:
        raise EvaluationError(f"{checkpoint.path}: the model has no head, so it gives features and names no classes")
