"""Where a split's images come from: memory, memory and a resize, or files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image

from tinyvit.backend import arrays, devices
from tinyvit.backend.arrays import Array
from tinyvit.backend.parallel import available_cores
from tinyvit.data.base import Data, DataError, Split
from tinyvit.data.image import fit, open_rgb, to_array
from tinyvit.data.stored import Listing
from tinyvit.distributed.group import SLOW, Group

RESIDENT_SHARE = 0.25  # of a device's free memory, which a split may take for the whole run; the steps need the rest

T = TypeVar("T")
R = TypeVar("R")
ImageTransform = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class ArraySplit:
    """Images held in memory, the host's or a device's: `images` (N, C, H, W) uint8, `labels` (N,) int64, NumPy.

    `listing` has their names, where they have any.
    """

    images: Array
    labels: np.ndarray
    skipped: list[str]
    gaps: Sequence[tuple[int, int]] = ()
    listing: Listing | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> Array:
        """Images (B, C, H, W) uint8, where all of them are; the same with and without `rng`."""
        if arrays.on_host(self.images):
            return self.images[indices]
        with arrays.on_device_of(self.images):
            places = arrays.convert(indices, self.images)
            return arrays.namespace(self.images).take(self.images, places, axis=0)

    def take(self, indices: np.ndarray) -> Self:
        """The images at `indices`, in that order."""
        listing = None if self.listing is None else self.listing.take(indices)
        return replace(self, images=self.read(indices), labels=self.labels[indices], listing=listing)


@dataclass(frozen=True)
class ResizedSplit:
    """Images held in memory, `images` (N, 3, h, w) uint8, and resized to `size` by `fit` when they are read."""

    images: np.ndarray
    labels: np.ndarray
    skipped: list[str]
    size: tuple[int, int]
    fit_options: Mapping[str, Any]
    gaps: Sequence[tuple[int, int]] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Images (B, 3, H, W) uint8; the same with and without `rng`."""

        def resized(index: int) -> np.ndarray:
            image = Image.fromarray(self.images[index].transpose(1, 2, 0))
            return to_array(fit(image, self.size, **self.fit_options))

        return stack(in_threads(resized, indices), self.size)

    def take(self, indices: np.ndarray) -> Self:
        """The images at `indices`, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class FileSplit:
    """Images that are decoded each time they are read, at `size` (height, width).

    They are resized and cut by `fit` with `fit_options`; for training (with `rng`) each goes through `transform` first.
    """

    listing: Listing
    skipped: list[str]
    size: tuple[int, int]
    transform: ImageTransform | None
    fit_options: Mapping[str, Any] = field(default_factory=dict)
    gaps: Sequence[tuple[int, int]] = ()

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self.listing.labels

    def __len__(self) -> int:
        return len(self.listing)

    def read(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Images (B, 3, H, W) uint8. Raises DataError naming a file that cannot be read."""
        rngs = [None] * len(indices) if rng is None else rng.spawn(len(indices))
        return stack(in_threads(self._image, zip(indices, rngs, strict=True)), self.size)

    def take(self, indices: np.ndarray) -> Self:
        """The images at `indices`, in that order."""
        return replace(self, listing=self.listing.take(indices))

    def _image(self, task: tuple[int, np.random.Generator | None]) -> np.ndarray:
        index, rng = task
        try:
            image = open_rgb(self.listing.image(index))
        except DataError as error:
            raise DataError(f"{error}{SKIP_HINT}") from error
        if rng is None or self.transform is None:
            return to_array(fit(image, self.size, **self.fit_options))
        return to_array(fit(self.transform(image, rng), self.size, crop_pct=1.0))


def draw_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which of the images with these labels (N,) are held out, (N,) booleans.

    Of each class it is a random `share`, at least one and not all. Raises DataError for a share that is none.
    """
    if not 0 < share < 1:
        raise DataError(f"val_fraction {share} given, expected more than 0 and less than 1")
    rng = np.random.default_rng(seed)
    drawn = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn[rng.permutation(members)[: min(max(round(len(members) * share), 1), len(members) - 1)]] = True
    return drawn


def hold_out(data: Data, share: float, seed: int) -> Data:
    """`data` with a random `share` of each class's training images as `val`, which then chooses the epoch.

    It is drawn as if none of them had been left out: whether one can be read must not decide where others belong.
    """
    whole: Any = data.train
    count = len(whole) + len(whole.gaps)
    places, classes = np.array(whole.gaps, np.int64).reshape(-1, 2).T
    kept = np.delete(np.arange(count), places)
    labels = np.empty(count, np.int64)
    labels[kept], labels[places] = whole.labels, classes
    drawn = draw_share(labels, share, seed)

    def part(held: bool) -> Any:
        lost = np.flatnonzero(drawn[places] == held)
        skipped = [whole.skipped[i] for i in lost] + whole.skipped[len(places) :]
        gaps = [whole.gaps[i] for i in lost]
        return replace(whole.take(np.flatnonzero(drawn[kept] == held)), skipped=skipped, gaps=gaps)

    train, val = part(False), part(True)
    if not len(val):
        raise DataError(f"{data.name} has one training image a class, so none can be held out")
    if missing := set(whole.labels.tolist()) - set(train.labels.tolist()):
        raise DataError(f"class {data.class_names[min(missing)]} of {data.name} has no readable image to train on")
    return replace(data, train=train, val=val, drawn_from=count)


def without_augmentation(split: Split) -> Split:
    """`split` with its images read for training as they are for evaluation."""
    return replace(split, transform=None) if isinstance(split, FileSplit) else split


def image_names(name: str, split: Split) -> list[str]:
    """What the images of the split `name` are called: their files, or the name with their number."""
    listing = getattr(split, "listing", None)
    return [f"{name}/{i}" if listing is None else listing.name(i) for i in range(len(split))]


SKIP_HINT = " (--skip-corrupt leaves such images out)"


UNCOUNTED = "an unknown number of images of "  # begins what `skipped` says of an archive that was not read to its end


def left_out(skipped: Sequence[str]) -> str:
    """What is said of the images that were left out, of which there are some."""
    images = [name for name in skipped if not name.startswith(UNCOUNTED)]
    archives = [name for name in skipped if name.startswith(UNCOUNTED)]
    said = []
    if images:
        said.append(f"{len(images)} image{'s' * (len(images) > 1)} that cannot be read; the first is {images[0]}")
    if archives:
        said.append(archives[0] + (f", and of {len(archives) - 1} more archives" if archives[1:] else ""))
    return f"left out {'; and '.join(said)}"


def passed_over(files: Sequence[str]) -> str:
    """What is said of files among images that are none, of which there are some."""
    what = f"{len(files)} files that are no images of a class" if files[1:] else "1 file that is no image of a class"
    return f"passed over {what}, the first is {files[0]}"


def resident(data: Data, device: Any) -> Data:
    """`data` whose training and validation images lie on `device` (as for `nn.Module.to`), as uint8, where they fit.

    Images that are read from files, resized at each reading, or larger than RESIDENT_SHARE of the device's free
    memory stay where they are: a `Loader` moves their batches.
    """

    def moved(split: Split) -> Split:
        if not isinstance(split, ArraySplit) or split.images.nbytes > RESIDENT_SHARE * devices.free_memory(device):
            return split
        return replace(split, images=devices.mover(device)(split.images))

    if device == "cpu":
        return data
    if data.val is None:
        return replace(data, train=moved(data.train), test=moved(data.test))
    return replace(data, train=moved(data.train), val=moved(data.val))


def stack(images: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(B, 3, H, W), also of no images at all."""
    return np.stack([np.empty((3, *size), np.uint8), *images])[1:]


def in_threads(
    work: Callable[[T], R], items: Iterable[T], threads: int | None = None, ahead: int | None = None
) -> Iterator[R]:
    """`map(work, items)` with the calls spread over `threads`, one a core unless said otherwise.

    Results come in order, and at most `ahead` of them, twice the cores, wait for the caller. One who stops early leaves
    no thread behind.
    """
    waiting = 2 * available_cores() if ahead is None else ahead
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads or available_cores(), thread_name_prefix="tinyvit-loader") as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > waiting:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def in_processes(work: Callable[[T], R], items: Sequence[T], group: Group, threads: int | None = None) -> Iterator[R]:
    """`in_threads(work, items, threads)`, each item worked on by one process of `group`, the results given to all.

    Every process has to ask for all results, or stop at the same one. They are what `Group.exchange` takes.
    """
    mine = in_threads(work, items[group.rank :: group.size], threads)
    for start in range(0, len(items), group.size):
        yield from group.exchange(next(mine, None), SLOW)[: len(items) - start]
