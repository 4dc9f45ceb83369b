"""Labelled images by name, before they are decoded, and what every list of them goes through to become a data set."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.data.base import Data, DataError, Split, Statistics, channel_sums, chunks, mean_and_std, pair
from tinyvit.data.image import fit, open_rgb, opened, to_array, upright_size
from tinyvit.data.image_transforms import random_resized_crop
from tinyvit.data.splits import (
    SKIP_HINT,
    ArraySplit,
    FileSplit,
    ImageTransform,
    draw_share,
    in_processes,
    in_threads,
    stack,
)
from tinyvit.data.stored import Listing, Rows
from tinyvit.distributed.group import ALONE, Group
from tinyvit.files.bar import bar

SMALL = 64  # images up to this side are kept at their size and trained on whole
LARGE_SIZE = 224
MEMORY = 1 << 30  # bytes; a split that fits is decoded once and kept
SAMPLE = 20_000  # images of a larger split that are decoded beforehand, for the mean and std
CHUNK = 1 << 20  # bytes that a thread decodes at a time
FILES = 256  # files of which a thread reads a part at a time


def number_classes(
    source: Path, parts: Mapping[str, Rows], order: Sequence[str], val_fraction: float, seed: int
) -> tuple[tuple[str, ...], dict[str, Listing], int]:
    """The names of the classes, the images of each part, "train" with "val", "test" or both, and `Data.drawn_from`.

    The classes are those of the training images: first those in `order`, then the others by the alphabet. Without
    other parts, `val_fraction` of each class is drawn as "val". Raises DataError.
    """
    present = set(parts["train"].classes)
    names = tuple(dict.fromkeys([*(name for name in order if name in present), *sorted(present)]))
    if len(names) < 2:
        found = f"only {names[0]}" if names else "none"
        raise DataError(f"{source} must hold training images of at least two classes, found {found}")
    if strangers := sorted({name for rows in parts.values() for name in rows.classes} - present):
        raise DataError(
            f"{source}: {strangers[0]!r} is a class of test images that no training image has "
            f"(they have {', '.join(names)[:200]})"
        )
    listings = {part: Listing.of(rows, names) for part, rows in parts.items()}
    if len(listings) > 1:
        return names, listings, 0
    whole = listings["train"]
    train, val = split_classes(whole, names, val_fraction, seed)
    return names, {"train": train, "val": val}, len(whole)


def split_classes(listing: Listing, names: tuple[str, ...], val_fraction: float, seed: int) -> tuple[Listing, Listing]:
    """Training and test images: of each class a random `val_fraction`, at least one, is kept for the test."""
    test = draw_share(listing.labels, val_fraction, seed)
    if (counts := np.bincount(listing.labels)).min() < 2:
        name = names[np.argmin(counts)]
        raise DataError(f"class {name} of {listing.rows.root} has one image, at least two are needed to split it")
    return listing.take(np.flatnonzero(~test)), listing.take(np.flatnonzero(test))


@dataclass(frozen=True)
class Reading:
    """How images are read: arguments of `load_data`."""

    image_size: int | tuple[int, int] | None
    skip_corrupt: bool
    transform: ImageTransform | None
    fit_options: Mapping[str, Any]
    statistics: Statistics | None
    group: Group


def load_listings(
    kind: str, source: Path, names: tuple[str, ...], parts: dict[str, Listing], drawn_from: int, reading: Reading
) -> Data:
    """The images of each part of `source` as a data set, its classes called `names`.

    `kind` begins the fingerprint. Raises DataError.
    """
    test_name = "test" if "test" in parts else "val"
    size, group = reading.image_size, reading.group
    if group.size > 1:  # before they share the reading, which they have to do in step
        asked = (size, reading.skip_corrupt, reading.fit_options, reading.statistics, reading.transform is None)
        group.same({"list of images": digest_of_list(parts), "way to read images": repr(asked)})
    if size is None:
        size = common_size([parts["train"], parts[test_name]], group) or LARGE_SIZE
    size = pair(size)
    options = reading.fit_options
    if reading.transform is None and max(size) > SMALL:
        crop = partial(random_resized_crop, size=size, interpolation=options.get("interpolation", "bicubic"))
        reading = replace(reading, transform=crop)
    in_order = sorted(parts, key=("train", "test", "val").index)
    read = {part: load_split(part, parts[part], size, reading) for part in in_order}
    parts, splits = ({part: found[0] for part, found in read.items()}, {part: found[1] for part, found in read.items()})
    mean, std = read["train"][2]
    if not (counts := np.bincount(parts["train"].labels, minlength=len(names))).all():
        raise DataError(f"class {names[np.argmin(counts)]} of {source} has no readable image to train on")
    fingerprint = fingerprint_of(names, list(parts.values()), group.threads)
    return Data(
        source.resolve().stem if source.is_file() else source.resolve().name,
        splits["train"],
        splits[test_name],
        names,
        mean,
        std,
        size,
        in_chans=3,
        fingerprint=f"{kind}-{fingerprint}",
        fit_options=options,
        own_test=not drawn_from,
        test_name=test_name,
        no_images=tuple(dict.fromkeys(file for part in parts.values() for file in part.rows.no_images)),
        val=splits["val"] if test_name == "test" and "val" in splits else None,
        drawn_from=drawn_from,
    )


def common_size(listings: Sequence[Listing], group: Group) -> tuple[int, int] | None:
    """(height, width) shared by all readable images, if they do and it is small."""

    def differ(sizes: set[tuple[int, int]]) -> bool:
        return len(sizes) > 1 or any(max(size) > SMALL for size in sizes)

    def sizes_of(listing: Listing, positions: np.ndarray) -> list[tuple[int, int]]:
        sizes: set[tuple[int, int]] = set()
        for i in positions:
            with contextlib.suppress(Exception), opened(listing.image(i)) as image:  # reported when it is decoded
                sizes.add(upright_size(image))
            if differ(sizes):
                break
        return list(sizes)

    sizes: set[tuple[int, int]] = set()
    for listing in listings:
        parts = chunks(np.arange(len(listing)), FILES)
        for some in in_processes(partial(sizes_of, listing), parts, group, threads=1):
            sizes |= {(height, width) for height, width in some}
            if differ(sizes):
                return None
    return next(iter(sizes), None)


def load_split(
    part: str, listing: Listing, size: tuple[int, int], reading: Reading
) -> tuple[Listing, Split, Statistics]:
    """The images that can be read, as a split, with their mean and std, or with those that are known.

    Images that training reads like evaluation and that fit in MEMORY are decoded once and kept. Others are decoded
    here too, to find corrupt ones and the mean and std; but of a split of more than SAMPLE images only so
    many, unless corrupt ones are to be skipped. Where mean and std are known, only to skip corrupt ones.
    """
    transform, skip_corrupt = reading.transform if part == "train" else None, reading.skip_corrupt
    if reading.statistics is not None and not skip_corrupt:
        return listing, FileSplit(listing, [], size, transform, reading.fit_options), reading.statistics
    count = len(listing)
    keep = transform is None and count * 3 * size[0] * size[1] <= MEMORY
    everything = keep or skip_corrupt or count <= SAMPLE
    positions = np.arange(count) if everything else sampled(count)
    images = np.empty((count if keep else 0, 3, *size), np.uint8)
    readable: list[int] = []
    gaps: list[tuple[int, int]] = []

    def sums() -> Iterator[np.ndarray]:
        for chunk, (pixels, totals, failures) in decode(part, listing, positions, size, keep, reading):
            if failures and not skip_corrupt:
                raise DataError(f"{failures[0][1]}{SKIP_HINT}")
            unreadable = [i for i, _ in failures]
            gaps.extend((i, int(listing.labels[i])) for i in unreadable)
            if keep:
                images[len(readable) : len(readable) + len(pixels)] = pixels
            readable.extend(np.setdiff1d(chunk, unreadable))
            yield totals
        if not readable:
            which = f"none of the {count} images" if count > 1 else "no image"
            raise DataError(f"{which} of {listing.rows.root} can be read")

    statistics = mean_and_std(sums())
    skipped = [*(listing.name(i) for i, _ in gaps), *listing.rows.skipped]
    if everything:
        listing = listing.take(np.array(readable, dtype=int))
    if keep:
        names = replace(listing, rows=replace(listing.rows, contents=None))  # the images are not kept twice
        return listing, ArraySplit(images[: len(readable)], listing.labels, skipped, gaps, names), statistics
    return listing, FileSplit(listing, skipped, size, transform, reading.fit_options, gaps), statistics


def sampled(count: int) -> np.ndarray:
    """The positions of all of `count` images, or of SAMPLE among them."""
    return np.arange(count) if count <= SAMPLE else np.linspace(0, count - 1, SAMPLE).astype(int)


def decode(
    part: str, listing: Listing, positions: np.ndarray, size: tuple[int, int], keep: bool, reading: Reading
) -> Iterator[tuple[np.ndarray, Any]]:
    """Decode images in threads, each process of the group its share: chunks of positions, and what is at each.

    These are the pixels (n, 3, H, W) of the readable images, if they are to be kept, their `channel_sums`, and the
    positions of the others, each with its error.
    """

    # Pillow holds Python's lock for nearly all of a small file: one thread is faster than two.
    threads = 1 if common_size([listing.take(positions[:1])], ALONE) else reading.group.threads

    def work(chunk: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, list[tuple[int, str]]]:
        images, failures = [], list[tuple[int, str]]()
        for i in chunk:
            try:
                images.append(to_array(fit(open_rgb(listing.image(i)), size, **reading.fit_options)))
            except DataError as error:
                failures.append((int(i), str(error)))
        pixels = stack(images, size)
        return pixels if keep else None, channel_sums(pixels), failures

    parts = chunks(positions, max(1, CHUNK // (3 * size[0] * size[1])))
    with bar(f"reading {part}", len(positions), reading.group.leads) as done:
        for chunk, found in zip(parts, in_processes(work, parts, reading.group, threads), strict=True):
            yield chunk, found
            done(len(chunk))


def fingerprint_of(names: tuple[str, ...], parts: Iterable[Listing], threads: int | None) -> str:
    """A digest of the classes and of each image's name, class and bytes; of many images, the bytes of SAMPLE."""

    def mark(listing: Listing, positions: np.ndarray) -> list[str]:
        images = map(listing.image, positions)
        return [digest_of(x) if isinstance(x, Path) else hashlib.sha256(x.read()).hexdigest() for x in images]

    digest = hashlib.sha256(repr(names).encode())
    for part in parts:
        digest.update(f"{len(part)} images".encode())
        read = np.zeros(len(part), bool)
        read[sampled(len(part))] = True
        marks = chain.from_iterable(in_threads(partial(mark, part), chunks(np.flatnonzero(read), FILES), threads))
        for i, label in enumerate(part.labels):
            digest.update(repr((part.file(i), int(label), next(marks) if read[i] else "")).encode())
    return digest.hexdigest()[:16]


def digest_of(path: Path, whole: int = 1 << 16, part: int = 1 << 14) -> str:
    """A digest of a file's size and bytes; of a file larger than `whole` of three `part`s: first, middle and last."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for start in (0, (size - part) // 2, size - part) if size > whole else (0,):
            file.seek(start)
            digest.update(file.read(part if size > whole else whole))
    return digest.hexdigest()


def digest_of_list(parts: Mapping[str, Listing]) -> str:
    """A digest of the images' names and classes, which does not read them."""
    digest = hashlib.sha256()
    for part, listing in parts.items():
        digest.update(repr((part, len(listing), listing.labels.tolist())).encode())
        digest.update("\0".join(map(listing.file, range(len(listing)))).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


# What the parts of a data set are called, in lower case and without other characters than letters.
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev", "holdout"),
    "test": ("test", "testing"),
}
_ADDED = ("", "set", "split", "images", "imgs", "data")  # trainset, test_images


def part_of(name: str) -> str | None:
    """ "train", "val" or "test" for a name such as Training, seg_train or test_images; None for any other name."""
    letters = re.sub("[^a-z]", "", name.lower()).removeprefix("seg")
    for part, words in PARTS.items():
        if any(letters == word + added for word in words for added in _ADDED):
            return part
    return None


def one_of_each(source: Path, names: Iterable[str]) -> dict[str, str]:
    """The names that mean a part, by that part. Raises DataError for two names of one part."""
    found: dict[str, str] = {}
    for name in names:
        part = part_of(name)
        if part is None:
            continue
        if part in found:
            raise DataError(f"{source} has {part} images under two names, {found[part]} and {name}: keep one of them")
        found[part] = name
    return found
