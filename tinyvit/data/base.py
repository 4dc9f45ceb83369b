"""What a data set is: two splits of uint8 images, the class names, and the training images' mean and std."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

from tinyvit.errors import ReportedError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one per channel, in units of 0..1


class DataError(ReportedError):
    """Data that cannot be used."""


class Split(Protocol):
    """One part of a data set, read by index."""

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        ...

    @property
    def skipped(self) -> list[str]:
        """The images that were left out on request, because they cannot be read.

        Those of which it is not known to which of two drawn parts they belong are in both.
        """
        ...

    @property
    def gaps(self) -> Sequence[tuple[int, int]]:
        """Of the first of `skipped` the place that each had before, and its class; both are unknown for the others."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Images (B, C, H, W) uint8 at `indices`; with `rng`, as training wants them (random crops)."""
        ...

    def take(self, indices: np.ndarray) -> Self:
        """The part of the split at `indices`, in that order."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set with a training and a test split.

    `mean` and `std` are those of the training images, one per channel, in units of 0..1. `image_size` is
    (height, width). `fingerprint` identifies the data: the same images give the same string, wherever they lie.
    `fit_options` say how images were resized and cut: arguments of `read_image` that differ from its defaults.
    `own_test` is false where the test images were drawn from the training ones; `test_name` is what they are called,
    "test" or "val". `val` are validation images apart from them, if there are any. `no_images` are files among the
    images of any part that were passed over, because they are none. `drawn_from` counts the images of which a part was
    drawn at random, with those that could not be read; 0 where none was drawn.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    in_chans: int
    fingerprint: str
    fit_options: Mapping[str, Any] = field(default_factory=dict)
    own_test: bool = True
    test_name: str = "test"
    no_images: tuple[str, ...] = ()
    val: Split | None = None
    drawn_from: int = 0

    @property
    def parts(self) -> dict[str, Split]:
        """The splits by name: "train", "val" and "test", as far as the data set has them."""
        val = {} if self.val is None else {"val": self.val}
        return {"train": self.train, **val, self.test_name: self.test}

    @property
    def validation(self) -> Split:
        """The images that choose the best epoch."""
        return self.test if self.val is None else self.val


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image size given as one number or two."""
    height, width = (size, size) if isinstance(size, int | np.integer) else size
    if height < 1 or width < 1:
        raise DataError(f"image size {height}x{width} given, expected at least 1x1")
    return int(height), int(width)


def channel_sums(batch: np.ndarray) -> np.ndarray:
    """Of the values of each channel of a uint8 batch (B, C, H, W) the count, sum and sum of squares, (3, C) int64."""
    values = np.moveaxis(batch, 1, 0).reshape(batch.shape[1], -1)  # (C, B*H*W)
    squares = (values.astype(np.uint16) ** 2).sum(axis=1, dtype=np.int64)
    return np.stack([np.full(len(values), values.shape[1]), values.sum(axis=1, dtype=np.int64), squares])


def mean_and_std(sums: Iterable[np.ndarray]) -> Statistics:
    """Mean and population standard deviation per channel, in units of 0..1, from the `channel_sums` of all batches.

    Sums are exact integers, so neither the batch size nor the order matters. A channel that never varies gets
    the standard deviation 1, so that dividing by it is harmless.
    """
    count, total, squares = sum(sums, np.zeros((3, 1), np.int64))
    mean = total / (255 * count)
    variance = squares / (255**2 * count) - mean**2
    constant = count * squares == total * total
    std = np.where(constant, 1.0, np.sqrt(np.maximum(variance, 0)))
    return tuple(mean.tolist()), tuple(std.tolist())


def chunks(array: np.ndarray, length: int) -> list[np.ndarray]:
    """`array` in parts of `length`, of which the last may be shorter."""
    return [array[start : start + length] for start in range(0, len(array), length)]


def statistics_of(images: np.ndarray) -> Statistics:
    """Mean and standard deviation of images (N, C, H, W), in slices of about 16 MB."""
    return mean_and_std(map(channel_sums, chunks(images, max(1, (1 << 24) // images[0].nbytes))))
