"""Batches in a deterministic order, the next ones prepared in a thread while the caller computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from tinyvit.backend import arrays, devices
from tinyvit.data.augment import mirror
from tinyvit.data.base import Split
from tinyvit.data.splits import in_threads
from tinyvit.distributed import ALONE, Group

AHEAD = 2  # batches prepared beyond the one in the caller's hands
ORDER, BATCH, FLIP = 1, 2, 3  # separate the random streams of an epoch's order, of its batches, and of first flips

Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[Any, Any]]


class Loader:
    """Iterates over a split in batches; what a batch holds depends only on (seed, epoch, batch number).

    `transform(images, labels, rng)` turns uint8 (B, C, H, W) images into what the model takes (see Augment).
    `shuffle` is training: a new order every epoch, and images read with random crops where the split has them.
    `alternate_flip`: in training each image is mirrored in every second epoch, which ones first is drawn (Jordan 2024,
    arXiv:2404.00498, section 3.6). `repeats`: an epoch has so many copies, one after the other, of as many times fewer
    images (Berman et al. 2019, arXiv:1902.05509).
    With a `group` (see `tinyvit.distributed`) a batch is this process's part of it, read and transformed as within the
    whole one; an image that `transform.mixes` with another process's is read by both.
    `drop_last` leaves out a last batch that is not full. With a `device` (as for `nn.Module.to`) images that are read
    elsewhere are moved there before they are transformed; without one they stay where the split has them.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        transform: Transform | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        alternate_flip: bool = False,
        repeats: int = 1,
        device: Any = None,
        group: Group = ALONE,
    ) -> None:
        if not callable(transform):
            raise TypeError(f"Loader expects a transform such as default_augment(data), got {type(transform).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size} given, expected at least 1")
        self.split = split
        self.batch_size = batch_size
        self.transform: Transform = transform
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.repeats = repeats
        self.group = group
        self.flipped = np.random.default_rng([FLIP, seed]).random(len(split)) < 0.5 if alternate_flip else None
        self._move = arrays.as_array if device is None else devices.mover(device)

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        raise TypeError("a Loader is iterated by epochs, each of which has an order of its own: use loader.epoch(0)")

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Any, Any]]:
        """The (images, labels) of one epoch from batch `first_batch` on.

        An error in the thread is raised here; a caller that stops early leaves no thread behind.
        """
        order = np.arange(len(self.split))
        if self.shuffle:
            np.random.default_rng([ORDER, self.seed, epoch]).shuffle(order)
        order = np.repeat(order, self.repeats)[: len(order)]
        numbers = range(first_batch, len(self))
        yield from in_threads(partial(self._batch, order, epoch), numbers, threads=1, ahead=AHEAD)

    def _batch(self, order: np.ndarray, epoch: int, number: int) -> tuple[Any, Any]:
        rng = np.random.default_rng([BATCH, self.seed, epoch, number])
        indices = order[number * self.batch_size : (number + 1) * self.batch_size]
        first, last = self.group.part(batch := len(indices))
        rows = np.arange(first, last)
        if last - first < batch:
            if getattr(self.transform, "mixes", False):
                rows = np.concatenate([rows, batch - 1 - rows[::-1]])  # which, turned round, are partners again
            indices, rng = indices[rows], RowsOf(rng, rows, batch)
        images = self._move(self.split.read(indices, rng if self.shuffle else None))
        with arrays.on_device_of(images):
            if self.flipped is not None:
                images = mirror(images, self.flipped[indices] ^ bool(epoch % 2))
            labels = arrays.convert(self.split.labels[indices], images)
            images, labels = self.transform(images, labels, rng)
            return images[: last - first, ...], labels[: last - first, ...]


class RowsOf(np.random.Generator):
    """What a generator draws for a whole batch, at some of its rows.

    A draw whose first dimension is the number of `rows` is for them: it is made for the `batch`, and cut to the rows.
    """

    def __init__(self, rng: np.random.Generator, rows: np.ndarray, batch: int) -> None:
        super().__init__(rng.bit_generator)
        self.rows, self.batch = rows, batch

    def _cut(self, draw: Callable[[Any], Any], size: Any) -> Any:
        shape = tuple(np.atleast_1d(size)) if size is not None else ()
        if shape[:1] != (len(self.rows),):
            return draw(size)
        return draw((self.batch, *shape[1:]))[self.rows]

    def random(self, size: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self._cut(lambda n: super(RowsOf, self).random(n, *args, **kwargs), size)

    def integers(self, low: Any, high: Any = None, size: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._cut(lambda n: super(RowsOf, self).integers(low, high, n, **kwargs), size)

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return self._cut(lambda n: super(RowsOf, self).uniform(low, high, n), size)

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        return self._cut(lambda n: super(RowsOf, self).normal(loc, scale, n), size)

    def beta(self, a: Any, b: Any, size: Any = None) -> Any:
        return self._cut(lambda n: super(RowsOf, self).beta(a, b, n), size)

    def spawn(self, n_children: int) -> list[np.random.Generator]:
        wanted = n_children == len(self.rows)
        children = self.bit_generator.spawn(self.batch if wanted else n_children)
        return [np.random.Generator(children[i]) for i in (self.rows if wanted else range(n_children))]
