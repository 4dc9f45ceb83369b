"""CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html) in its binary and its Python layout."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .base import Data, DataError, in_batches, mean_and_std, pair
from .splits import ArraySplit, ResizedSplit

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
SIDE = 32
PIXELS = 3 * SIDE * SIDE


def find_cifar10(directory: Path) -> Path | None:
    """The directory that holds CIFAR-10's batch files: `directory` itself or its child of the usual name."""
    for place in (directory, directory / "cifar-10-batches-bin", directory / "cifar-10-batches-py"):
        if any((place / name).is_file() for name in ("data_batch_1.bin", "data_batch_1")):
            return place
    return None


def load_cifar10(directory: Path, image_size: int | tuple[int, int] | None = None) -> Data:
    """CIFAR-10 from a directory of batch files in either layout; raises DataError naming the file that is at fault."""
    binary = (directory / "data_batch_1.bin").is_file()
    ending, read = (".bin", read_binary) if binary else ("", read_pickled)
    missing = [name + ending for name in TRAIN + TEST if not (directory / (name + ending)).is_file()]
    if missing:
        raise DataError(f"{directory} lacks {', '.join(missing)}")
    names = class_names(directory)
    train, test = (
        tuple(np.concatenate(parts) for parts in zip(*(read(directory / (n + ending), len(names)) for n in group)))
        for group in (TRAIN, TEST)
    )
    mean, std = mean_and_std(in_batches(train[0]))
    size = pair(image_size or SIDE)
    splits = [
        ArraySplit(images, labels, []) if size == (SIDE, SIDE) else ResizedSplit(images, labels, size)
        for images, labels in (train, test)
    ]
    digest = hashlib.sha256(repr(names).encode())
    for array in train + test:
        digest.update(array)
    return Data("cifar10", *splits, names, mean, std, size, 3, f"cifar10-{digest.hexdigest()[:16]}")


def class_names(directory: Path) -> tuple[str, ...]:
    """From batches.meta.txt or batches.meta; CIFAR-10's own without either file."""
    text, pickled = directory / "batches.meta.txt", directory / "batches.meta"
    if text.is_file():
        names = text.read_text(encoding="utf-8", errors="replace").split("\n")
        return tuple(name.strip() for name in names if name.strip())
    if not pickled.is_file():
        return CLASSES
    names = load_plain_pickle(pickled).get("label_names")
    if not isinstance(names, list) or not names:
        raise DataError(f"{pickled} has no list of label_names")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def read_binary(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 3, 32, 32) uint8 and labels (N,) of a file of records: one label byte, then the pixels."""
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % (1 + PIXELS):
        raise DataError(
            f"{path} holds {content.size} bytes, not a whole number of {1 + PIXELS}-byte records: truncated?"
        )
    records = content.reshape(-1, 1 + PIXELS)
    return checked(path, records[:, 1:], records[:, 0], num_classes)


def read_pickled(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 3, 32, 32) uint8 and labels (N,) of a pickled dictionary with `data` (N, 3072) and `labels`."""
    batch = load_plain_pickle(path)
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise DataError(f"{path} has no 'data' array of uint8 rows of {PIXELS}")
    try:
        labels = np.asarray(labels, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        labels = np.empty(0)
    if labels.shape != (len(pixels),) or not len(pixels):
        raise DataError(f"{path} has {len(pixels)} pictures, but no list of as many integer 'labels'")
    return checked(path, pixels, labels, num_classes)


def checked(path: Path, pixels: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = int(np.argmax((labels < 0) | (labels >= num_classes)))
        raise DataError(f"{path} gives picture {wrong} the label {labels[wrong]}, expected 0 to {num_classes - 1}")
    return pixels.reshape(-1, 3, SIDE, SIDE), labels


def load_plain_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle file, read by an unpickler that runs nothing; its keys as strings."""
    with open(path, "rb") as file:
        try:
            content = PlainUnpickler(file).load()
        except Exception as error:  # a broken or hostile stream can raise nearly anything
            message = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"cannot read {path}: {message}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return {key.decode(errors="replace") if isinstance(key, bytes) else key: value for key, value in content.items()}


class PlainUnpickler(pickle.Unpickler):
    """Builds arrays, bytes, strings, numbers and containers; every other global is refused by name.

    The names that NumPy's pickles use lead to the functions below, not into NumPy, so that a file chooses neither
    the type nor a dtype that holds objects.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")  # Python 2 wrote the original files

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only arrays, bytes, strings, numbers and containers are read"
            )
        return PLAIN[module, name]


def plain_dtype(spec: str | bytes, align: bool = False, copy: bool = False) -> np.dtype:
    spec = spec.decode("ascii") if isinstance(spec, bytes) else spec
    if not isinstance(spec, str) or np.dtype(spec).kind not in "biufcSU":
        raise pickle.UnpicklingError(
            f"it asks for an array of {spec!r}, and only arrays of numbers and strings are read"
        )
    return np.dtype(spec, copy=True)  # a copy: the stream goes on to set its byte order


def empty_array(kind: object, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    return np.empty(0, np.uint8)  # the stream goes on to fill it


def array_from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def number(dtype: np.dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype)[0]


def latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes in a pickle that Python 2 can read


PLAIN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): plain_dtype,
    ("numpy", "ndarray"): None,
    ("_codecs", "encode"): latin1,
}
for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    PLAIN[f"{core}.multiarray", "_reconstruct"] = empty_array
    PLAIN[f"{core}.multiarray", "scalar"] = number
    PLAIN[f"{core}.numeric", "_frombuffer"] = array_from_buffer
for builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    for kind in (set, frozenset, bytearray, bytes, complex):
        PLAIN[builtins, kind.__name__] = kind
