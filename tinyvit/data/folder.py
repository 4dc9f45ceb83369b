"""Image folders: `train/CLASS/*` with `test/CLASS/*` (or val), or just `CLASS/*`, split here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinyvit.data.base import Data, DataError, Split, mean_and_std, pair
from tinyvit.data.picture import fit, open_rgb, to_array
from tinyvit.data.picture_transforms import random_resized_crop
from tinyvit.data.splits import SKIP_HINT, ArraySplit, FileSplit, PictureTransform, in_threads, stack

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
TEST_NAMES = ("test", "val", "validation", "valid")  # in the order of preference
SMALL = 64  # pictures up to this side are kept at their size and trained on whole
LARGE_SIZE = 224
MEMORY = 1 << 30  # bytes; a split that fits is decoded once and kept
SAMPLE = 20_000  # pictures of a larger split that are decoded beforehand, for the mean and std
CHUNK = 1 << 20  # bytes that a thread decodes at a time


@dataclass(frozen=True)
class Listing:
    """The pictures of one split: `files` relative to `root`, and their classes, `labels` (N,) int64."""

    root: Path
    files: list[str]
    labels: np.ndarray

    def sizes(self) -> list[tuple[str, int]]:
        """Each file with its bytes: other pictures under the same names are another data set."""
        return [(file, (self.root / file).stat().st_size) for file in self.files]

    def take(self, positions: np.ndarray) -> Listing:
        return Listing(self.root, [self.files[i] for i in positions], self.labels[positions])


def load_folder(
    root: Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    skip_corrupt: bool = False,
    picture_transform: PictureTransform | None = None,
    fit_options: Mapping[str, Any] | None = None,
) -> Data:
    """An image folder as a data set; see tinyvit.data.load_data. Raises DataError."""
    names, train, test = find_pictures(root, val_fraction, seed)
    size = pair(image_size or common_size(train, test) or LARGE_SIZE)
    if picture_transform is None and max(size) > SMALL:
        picture_transform = partial(random_resized_crop, size=size)
    options = fit_options or {}
    train, train_split, (mean, std) = load_split(train, size, skip_corrupt, picture_transform, "reading train", options)
    test, test_split, _ = load_split(test, size, skip_corrupt, None, "reading test", options)
    if missing := classes_without(train, names):
        raise DataError(f"class {missing[0]} of {root} has no readable picture to train on")
    digest = hashlib.sha256(repr((names, train.sizes(), test.sizes())).encode()).hexdigest()
    return Data(root.resolve().name, train_split, test_split, names, mean, std, size, 3, f"folder-{digest[:16]}", options)


def find_pictures(root: Path, val_fraction: float, seed: int) -> tuple[tuple[str, ...], Listing, Listing]:
    """Class names, training and test pictures of either layout."""
    train_root, test_root = find_splits(root)
    classes = class_folders(train_root)
    if len(classes) < 2:
        found = f"only {classes[0].name}" if classes else "none"
        raise DataError(f"{train_root} must hold at least two class folders with pictures, found {found}")
    names = tuple(folder.name for folder in classes)
    listing = list_pictures(train_root, names)
    if missing := classes_without(listing, names):
        raise DataError(f"class folder {train_root / missing[0]} has no pictures (looked for {' '.join(ENDINGS)})")
    if test_root is None:
        return names, *split_classes(listing, names, val_fraction, seed)
    if strangers := [folder for folder in class_folders(test_root) if folder.name not in names]:
        raise DataError(f"{strangers[0]} is a class that {train_root} does not have (it has {', '.join(names)[:200]})")
    test = list_pictures(test_root, names)
    if not test.files:
        raise DataError(f"the class folders of {test_root} have no pictures (looked for {' '.join(ENDINGS)})")
    return names, listing, test


def find_splits(root: Path) -> tuple[Path, Path | None]:
    """The folder of the training classes, and the one of the test classes where there is one."""
    folders = {folder.name.lower(): folder for folder in class_folders(root)}
    tests = [folders[name] for name in TEST_NAMES if name in folders and class_folders(folders[name])]
    if "train" in folders:
        return folders["train"], tests[0] if tests else None
    if tests and set(folders) <= set(TEST_NAMES):
        raise DataError(f"{root} has {tests[0].name}/ but no train/")
    return root, None


def class_folders(folder: Path) -> list[Path]:
    """Visible folders in `folder` by name; links that lead back up to it are left out."""
    here = folder.resolve()
    return sorted(
        child
        for child in folder.iterdir()
        if not child.name.startswith((".", "__")) and child.is_dir() and not here.is_relative_to(child.resolve())
    )


def list_pictures(root: Path, names: tuple[str, ...]) -> Listing:
    """The pictures in and below each class folder, by name; links to folders are not followed."""
    files, labels = [], []
    for label, name in enumerate(names):
        for folder, folders, members in os.walk(root / name):
            folders[:] = [child for child in folders if not child.startswith(".")]
            inside = Path(folder).relative_to(root).as_posix()
            pictures = (m for m in members if m.lower().endswith(ENDINGS) and not m.startswith("."))
            files += (f"{inside}/{picture}" for picture in pictures)
        labels += [label] * (len(files) - len(labels))
    order = sorted(range(len(files)), key=lambda i: (labels[i], files[i]))
    return Listing(root, files, np.array(labels, dtype=np.int64)).take(order)


def classes_without(listing: Listing, names: tuple[str, ...]) -> list[str]:
    """The classes of which `listing` has no picture."""
    return [names[i] for i in np.flatnonzero(np.bincount(listing.labels, minlength=len(names)) == 0)]


def split_classes(listing: Listing, names: tuple[str, ...], val_fraction: float, seed: int) -> tuple[Listing, Listing]:
    """Training and test pictures: of each class a random `val_fraction`, at least one, is kept for the test."""
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction {val_fraction} given, expected more than 0 and less than 1")
    rng = np.random.default_rng(seed)
    test = np.zeros(len(listing.files), dtype=bool)
    for label, name in enumerate(names):
        members = np.flatnonzero(listing.labels == label)
        if len(members) < 2:
            raise DataError(f"class {name} of {listing.root} has one picture, at least two are needed to split it")
        held_out = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        test[rng.permutation(members)[:held_out]] = True
    return listing.take(np.flatnonzero(~test)), listing.take(np.flatnonzero(test))


def common_size(*listings: Listing) -> tuple[int, int] | None:
    """(height, width) shared by all readable pictures, if they do and it is small."""
    found = None
    for listing in listings:
        for file in listing.files:
            try:
                with Image.open(listing.root / file) as picture:
                    size = picture.size[::-1]
            except Exception:  # unreadable: reported when it is decoded
                continue
            if max(size) > SMALL or size != (found or size):
                return None
            found = size
    return found


def load_split(
    listing: Listing,
    size: tuple[int, int],
    skip_corrupt: bool,
    transform: PictureTransform | None,
    title: str,
    fit_options: Mapping[str, Any],
) -> tuple[Listing, Split, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The pictures that can be read, as a split, with their mean and std.

    Pictures that training reads like evaluation and that fit in MEMORY are decoded once and kept. Others are decoded
    here too, to find corrupt ones and the mean and std; but of a split of more than SAMPLE pictures only so
    many, unless corrupt ones are to be skipped.
    """
    count = len(listing.files)
    keep = transform is None and count * 3 * size[0] * size[1] <= MEMORY
    everything = keep or skip_corrupt or count <= SAMPLE
    positions = np.arange(count) if everything else np.linspace(0, count - 1, SAMPLE).astype(int)
    images = np.empty((count if keep else 0, 3, *size), np.uint8)
    readable: list[int] = []
    skipped: list[str] = []

    def batches() -> Iterator[np.ndarray]:
        for chunk, pixels, failures in decode(listing, positions, size, title, fit_options):
            if failures and not skip_corrupt:
                raise DataError(f"{next(iter(failures.values()))}{SKIP_HINT}")
            skipped.extend(str(listing.root / listing.files[i]) for i in failures)
            if keep:
                images[len(readable) : len(readable) + len(pixels)] = pixels
            readable.extend(i for i in chunk if i not in failures)
            yield pixels
        if not readable:
            raise DataError(f"none of the {count} pictures of {listing.root} can be read")

    statistics = mean_and_std(batches())
    if everything:
        listing = listing.take(np.array(readable, dtype=int))
    if keep:
        return listing, ArraySplit(images[: len(readable)], listing.labels, skipped), statistics
    paths = [listing.root / file for file in listing.files]
    return listing, FileSplit(paths, listing.labels, skipped, size, transform, fit_options), statistics


def decode(
    listing: Listing, positions: np.ndarray, size: tuple[int, int], title: str, fit_options: Mapping[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[int, DataError]]]:
    """Decode pictures in threads: chunks of positions, the readable ones' pixels (n, 3, H, W), the others' errors."""

    def work(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, DataError]]:
        pictures, failures = [], {}
        for i in chunk:
            try:
                pictures.append(to_array(fit(open_rgb(listing.root / listing.files[i]), size, **fit_options)))
            except DataError as error:
                failures[i] = error
        return chunk, stack(pictures, size), failures

    step = max(1, CHUNK // (3 * size[0] * size[1]))
    chunks = [positions[start : start + step] for start in range(0, len(positions), step)]
    with tqdm(total=len(positions), desc=title, unit="picture", leave=False, disable=None) as bar:
        for result in in_threads(work, chunks):
            yield result
            bar.update(len(result[0]))
