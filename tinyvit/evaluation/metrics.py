"""How good a model is on a data set: accuracy, loss, confusion."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit.backend import arrays
from tinyvit.data.base import DataError
from tinyvit.distributed import ALONE, Group
from tinyvit.distributed.group import SLOW
from tinyvit.errors import ReportedError, UsageError
from tinyvit.files.atomic import atomic_write
from tinyvit.files.bar import bar

if TYPE_CHECKING:
    from tinyvit.checkpoints.checkpoint import Checkpoint
    from tinyvit.data import Data, Split
    from tinyvit.nn import Module

BATCH_SIZE = 256
DRAWN = {"train", "val"}  # the parts of images that are divided at random


class EvaluationError(ReportedError):
    """A model that cannot be run on this data or device."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well a model did on N images.

    Attributes:
        class_names: K of them.
        labels: (N,) true classes.
        measured: (4, N); see `measure`.
        probabilities: whether what classified gives any; without them there is no loss.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    measured: np.ndarray
    probabilities: bool = True

    @property
    def images(self) -> int:
        """How many images were measured."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """The share of images whose likeliest class is the true one."""
        return float(np.mean(self.measured[0] == 0))

    @property
    def top5(self) -> float:
        """The share of images whose true class is among the five likeliest ones."""
        return float(np.mean(self.measured[0] < 5))

    @property
    def summary(self) -> str:
        """The figures in a line; the top five of five classes or fewer say nothing."""
        top5 = f"   top-5 {self.top5:.2%}" if len(self.class_names) > 5 else ""
        loss = "" if self.loss is None else f"   loss {self.loss:.4f}"
        return f"accuracy {self.accuracy:.2%}{top5}{loss}"

    @property
    def loss(self) -> float | None:
        """The mean cross-entropy."""
        return float(self.measured[1].mean()) if self.probabilities else None

    @property
    def predicted(self) -> np.ndarray:
        """(N,) likeliest classes."""
        return self.measured[2].astype(np.int64)

    @property
    def per_class(self) -> list[tuple[str, float | None, int]]:
        """Of each class the name, the accuracy (None without images) and the number of images."""
        counts, hits = (np.bincount(x, minlength=len(self.class_names)).tolist()
                        for x in (self.labels, self.labels[self.measured[0] == 0]))  # fmt: skip
        return [(name, h / n if n else None, n) for name, h, n in zip(self.class_names, hits, counts, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        per_class = {name: accuracy for name, accuracy, _ in self.per_class}
        return {"accuracy": self.accuracy, "top5": self.top5, "loss": self.loss, "per_class": per_class}


def combined(parts: Sequence[Scores]) -> Scores:
    """The scores of several parts of a data set together."""
    labels, measured = np.concatenate([p.labels for p in parts]), np.concatenate([p.measured for p in parts], axis=1)
    return dataclasses.replace(parts[0], labels=labels, measured=measured)


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often images of each class (rows) were taken for each class (columns): (classes, classes) int64."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def write_confusion(path: Path, scores: Scores) -> None:
    """Write how often images of each class (rows) were taken for each class (columns), as a CSV file."""
    names = scores.class_names
    counts = confusion_counts(scores.labels, scores.predicted, len(names)).tolist()
    _write_csv(path, [["true class", *names], *([name, *row] for name, row in zip(names, counts, strict=True))])


def write_predictions(path: Path, scores: Scores, images: Sequence[str]) -> None:
    """Write the true class, the predicted one and its probability, if known, of each image as a CSV file.

    `images` are their names.
    """
    columns = {
        "image": images,
        "true class": [scores.class_names[k] for k in scores.labels],
        "predicted class": [scores.class_names[k] for k in scores.predicted],
    }
    if scores.probabilities:
        columns["probability"] = [f"{p:.6f}" for p in scores.measured[3]]
    _write_csv(path, [list(columns), *zip(*columns.values(), strict=True)])


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with (
        atomic_write(path) as beside,
        open(beside, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file).writerows(rows)


def outputs_of(
    model: Module,
    split: Split,
    transform: Callable[..., Any],
    threads: int | None = None,
    precision: str = "fp32",
    done: Callable[[int], object] = lambda count: None,
) -> Iterator[np.ndarray]:
    """What the model gives for all images of a split in their order, by batches; arguments as for `evaluate`."""
    from tinyvit.data import Loader
    from tinyvit.execution.inference import predictions

    device = arrays.device_name(model.parameters()[0].data)
    loader = Loader(split, BATCH_SIZE, transform=transform, shuffle=False, device=device)
    return predictions(model, (images for images, _ in loader.epoch(0)), threads, precision, done)


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
    done: Callable[[int], object] = lambda count: None,
) -> Scores | None:
    """Run `model` over all of `split`, whose images have the classes `labels` (N,) in the model's order.

    The processes of a `group` share the images, and all get the scores of all.

    `transform` is as for `data.Loader`, mostly `Augment(mean, std)`; `threads` and `precision` are as for `predict`.
    `done` is called with numbers of images that this process has done.
    Returns None when `stop()` became true on the way. Raises EvaluationError when an output is not finite.
    """
    own, mine = share(split, group)
    threads = threads or group.threads
    measured, first, true = [np.empty((4, 0))], 0, labels[mine]
    for outputs in in_step(outputs_of(model, own, transform, threads, precision, done), len(split), group, stop):
        logits = outputs.astype(np.float64)  # (B, K)
        if not np.all(np.isfinite(logits)):
            raise EvaluationError("the model's outputs are not finite")
        measured.append(measure(logits, true[first : first + len(logits)]))
        first += len(logits)
    found = np.concatenate(group.exchange(np.concatenate(measured, axis=1), SLOW), axis=1)
    return Scores(tuple(class_names), labels, found) if found.shape[1] == len(labels) else None


def evaluate_parts(
    checkpoint: Checkpoint, model: Module, data: Data, parts: Mapping[str, Split], precision: str, group: Group
) -> dict[str, Scores]:
    """The scores of the checkpoint's `model` on `parts` of a data set, in its own classes. Raises EvaluationError."""
    from tinyvit.data import Augment

    scaling, found = Augment(*checkpoint.preprocessing.statistics), {}
    with progress(group, *parts.values()) as done:
        for name, split in parts.items():
            labels, names = labels_for(checkpoint, split.labels, data.class_names), checkpoint.class_names
            scores = evaluate(model, split, labels, names, scaling, precision=precision, group=group, done=done)
            assert scores is not None  # nothing stops it
            found[name] = scores
    if found.keys() >= DRAWN and drawn_otherwise(checkpoint, data):
        return {"train and val": combined([found.pop(name) for name in ("train", "val")]), **found}
    return found


def progress(group: Group, *splits: Split) -> contextlib.AbstractContextManager[Callable[[int], object]]:
    """The first process shows how far its share of the splits is; see `bar`."""
    return bar("images", sum(len(range(*group.part(len(split)))) for split in splits), group.leads)


def share(split: Split, group: Group) -> tuple[Split, slice]:
    """This process's part of `split`, which may be empty, and where it lies."""
    if group.size == 1:
        return split, slice(None)
    first, last = group.part(len(split))
    return split.take(np.arange(first, last)), slice(first, last)


def in_step(
    outputs: Iterator[np.ndarray], images: int, group: Group, stop: Callable[[], Any] = lambda: False
) -> Iterator[np.ndarray]:
    """`outputs` of the batches of this process's share of so many `images`, until `stop()` is true in one process.

    Before each batch the processes wait for each other, so that one that is gone is noticed; long, as a GPU's kernels
    may be compiled and tried for a batch in one process and not in another.
    """
    for _ in range(0, -(-images // group.size), BATCH_SIZE):
        if any(group.exchange(bool(stop()), SLOW)):
            return
        yield from itertools.islice(outputs, 1)


def measure(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each image how many classes come before its true one, its cross-entropy, the likeliest class and that one's
    probability, (4, B), from logits (B, K) in float64."""
    predicted = logits.argmax(axis=1)
    losses, probability = cross_entropies(logits, labels), np.exp(-cross_entropies(logits, predicted))
    return np.stack([ranks(logits, labels), losses, predicted, probability])


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


def chosen_parts(checkpoint: Checkpoint, data: Data, name: str | None) -> dict[str, Split]:
    """The split of that name, or all of them for "all" and None. Raises UsageError, DataError."""
    if name in (None, "all"):
        return data.parts
    if name not in data.parts:
        raise UsageError(f"{data.name} has no {name} images, expected --split {', '.join(data.parts)} or all")
    if name in DRAWN and (why := drawn_otherwise(checkpoint, data)):
        raise DataError(f"{why}; leave --split out to measure all")
    return {name: data.parts[name]}


def held_out_as_in_run(checkpoint: Checkpoint, data: Data) -> Data:
    """`data` with `val`, the training images that the checkpoint's run held out of data with a test part, if it did."""
    from tinyvit.data.splits import hold_out

    split = checkpoint.split
    if not (split.get("held_out") and "val_fraction" in split and data.own_test) or data.val is not None:
        return data
    return hold_out(data, split["val_fraction"], split.get("seed", 0))


def drawn_otherwise(checkpoint: Checkpoint, data: Data) -> str:
    """Why parts that were drawn are not those of the checkpoint's run; "" where they are, or nothing was drawn.

    One image more or less gives others, so that images that the run trained on would be among those it held out.
    """
    then = checkpoint.split.get("images")
    if not data.drawn_from or then in (None, data.drawn_from):
        return ""
    drawn = f"{data.name} has {data.drawn_from} images to draw a part from, the model's run had {then}"
    return f"{drawn}: which of them it trained on is not known"


def data_for(checkpoint: Checkpoint, source: str, skip_corrupt: bool = False, group: Group = ALONE) -> Data:
    """A data set (see `data.load_data`), prepared for a checkpoint; without a test part, divided as in its run.

    Raises DataError, and EvaluationError where the model takes images of other channels.
    """
    from tinyvit.data import load_data

    data = load_data(
        source,
        image_size=checkpoint.config.image_size,
        skip_corrupt=skip_corrupt,
        fit_options=checkpoint.preprocessing.fit,
        statistics=checkpoint.preprocessing.statistics,
        group=group,
        **{name: checkpoint.split[name] for name in ("val_fraction", "seed") if name in checkpoint.split},
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
            + "; --probe knn measures the features on any classes, train --init learns these"
        )
    if several := [name for name in class_names if checkpoint.class_names.count(name) > 1]:
        raise EvaluationError(f"the data set's class {several[0]!r} is the name of several classes of the model")
    return np.array([index[name] for name in class_names], dtype=np.int64)[labels]


def check_head(checkpoint: Checkpoint) -> None:
    """Raises EvaluationError for a model that gives features."""
    if not checkpoint.config.num_classes:
        raise EvaluationError(f"{checkpoint.path}: the model has no head, so it gives features and names no classes")
