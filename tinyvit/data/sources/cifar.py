"""CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html) in its binary and its Python layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.data.base import Data, DataError, Split, pair, statistics_of
from tinyvit.data.splits import ArraySplit, ResizedSplit
from tinyvit.files.plain_pickle import load_pickle
from tinyvit.files.reading import check_regular, open_regular
from tinyvit.files.text import one_line

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
SIDE = 32
PIXELS = 3 * SIDE * SIDE
LARGEST = 1 << 28  # bytes of a file, which is 30 MB as it was published


def find_cifar10(directory: Path) -> Path | None:
    """The directory that holds CIFAR-10's batch files: `directory` itself or its child of the usual name."""
    for place in (directory, directory / "cifar-10-batches-bin", directory / "cifar-10-batches-py"):
        if any((place / name).is_file() for name in ("data_batch_1.bin", "data_batch_1")):
            return place
    return None


def load_cifar10(
    directory: Path, image_size: int | tuple[int, int] | None = None, fit_options: Mapping[str, Any] | None = None
) -> Data:
    """CIFAR-10 from a directory of batch files in either layout; raises DataError naming the file that is at fault."""
    binary = (directory / "data_batch_1.bin").is_file()
    ending, read = (".bin", read_binary) if binary else ("", read_pickled)
    missing = [name + ending for name in TRAIN + TEST if not (directory / (name + ending)).is_file()]
    if missing:
        raise DataError(f"{directory} lacks {', '.join(missing)}")
    names = class_names(directory)
    batches = {name: read(directory / (name + ending), len(names)) for name in TRAIN + TEST}
    train, test = (
        tuple(np.concatenate(parts) for parts in zip(*(batches[name] for name in group), strict=True))
        for group in (TRAIN, TEST)
    )
    mean, std = statistics_of(train[0])
    size = pair(SIDE if image_size is None else image_size)
    options = {"crop_pct": 1.0, **(fit_options or {})}
    as_stored = size == (SIDE, SIDE) and options["crop_pct"] == 1.0

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        return ArraySplit(images, labels, []) if as_stored else ResizedSplit(images, labels, [], size, options)

    digest = hashlib.sha256(repr(names).encode())
    for array in train + test:
        digest.update(array.tobytes())
    fingerprint = f"cifar10-{digest.hexdigest()[:16]}"
    return Data("cifar10", split(*train), split(*test), names, mean, std, size, 3, fingerprint, options)


def class_names(directory: Path) -> tuple[str, ...]:
    """From batches.meta.txt or batches.meta; CIFAR-10's own without either file."""
    text, pickled = directory / "batches.meta.txt", directory / "batches.meta"
    if text.is_file():
        with open_regular(text) as file:
            names = file.read(1 << 20).decode("utf-8", errors="replace").split("\n")
        return tuple(name.strip() for name in names if name.strip())
    if not pickled.is_file():
        return CLASSES
    stored = read_pickle(pickled).get("label_names")
    if not isinstance(stored, list) or not 1 <= len(stored) <= 1000:
        raise DataError(f"{pickled} has no list of label_names")
    if not all(isinstance(name, str | bytes) for name in stored):
        raise DataError(f"{pickled} has label_names that are not text")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else name for name in stored)


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle file, its keys as strings; nothing in the file is executed. Raises DataError."""
    with open_regular(path) as file:
        try:
            content = load_pickle(file)
        except Exception as error:  # the functions of a damaged pickle can raise nearly anything
            raise DataError(f"cannot read {path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return {key.decode(errors="replace") if isinstance(key, bytes) else str(key): content[key] for key in content}


def read_binary(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) of a file of records: one label byte, then the pixels."""
    if (size := check_regular(path)) > LARGEST:
        raise DataError(f"{path} has {size} bytes, expected at most {LARGEST}")
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % (1 + PIXELS):
        raise DataError(
            f"{path} is truncated: {content.size} bytes are not a whole number of {1 + PIXELS}-byte records"
        )
    records = content.reshape(-1, 1 + PIXELS)
    return checked(path, records[:, 1:], records[:, 0], num_classes)


def read_pickled(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) of a pickled dictionary with `data` (N, 3072) and `labels`."""
    batch = read_pickle(path)
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise DataError(f"{path} has no 'data' array of uint8 rows of {PIXELS}")
    if not isinstance(labels, list) or not all(isinstance(n, int | np.integer) and abs(int(n)) < 2**31 for n in labels):
        raise DataError(f"{path} has no 'labels' list of integers")
    if len(labels) != len(pixels) or not labels:
        raise DataError(f"{path} has {len(pixels)} images and {len(labels)} labels, expected as many of each")
    return checked(path, pixels, np.array(labels), num_classes)


def checked(path: Path, pixels: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = int(np.argmax((labels < 0) | (labels >= num_classes)))
        raise DataError(f"{path} gives image {wrong} the label {labels[wrong]}, expected 0 to {num_classes - 1}")
    return pixels.reshape(-1, 3, SIDE, SIDE), labels
