"""Data sets: where they come from (`load_data`), what is done to a batch (`Augment`), and in which order (`Loader`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tinyvit.data.augment import Augment
from tinyvit.data.base import Data, DataError, Split, Statistics
from tinyvit.data.image import read_image
from tinyvit.data.loader import Loader
from tinyvit.data.sources.cifar import find_cifar10, load_cifar10
from tinyvit.data.sources.csv_table import read_csv
from tinyvit.data.sources.download import cache_directory, fetch_cifar10
from tinyvit.data.sources.image_folder import find_in_folder, first_image
from tinyvit.data.sources.listing import SMALL, Reading, load_listings, number_classes
from tinyvit.data.sources.parquet import find_in_parquet, parquet_files
from tinyvit.data.sources.shapes import load_shapes
from tinyvit.data.sources.shards import files_of
from tinyvit.data.sources.tar_shards import find_in_tar
from tinyvit.data.splits import ImageTransform, resident
from tinyvit.data.stored import Rows
from tinyvit.distributed.group import ALONE, Group
from tinyvit.files.text import nearest

__all__ = [
    "Augment", "Data", "DataError", "Loader", "Split", "default_augment", "load_data", "read_image", "resident",
]  # fmt: skip

Finder = Callable[[Path], tuple[dict[str, Rows], Sequence[str]]]  # images by part, and the order of their classes
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def load_data(
    src: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    skip_corrupt: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    image_transform: ImageTransform | None = None,
    fit_options: Mapping[str, Any] | None = None,
    statistics: Statistics | None = None,
    group: Group = ALONE,
) -> Data:
    """The data set that `src` names.

    - "shapes": ten classes of images drawn from `seed` (the test images are always the same).
    - "cifar10": found in `cache_dir` ($TINYVIT_CACHE, else the platform's), or downloaded into it.
    - a directory in CIFAR-10's binary or Python layout, or one that holds it under its usual name.
    - an image folder: `train/CLASS/*` with `test/CLASS/*` (or val, validation, valid), or just `CLASS/*`, of which
      `val_fraction` of each class, drawn from `seed`, becomes the test split.
    - a CSV file whose header names the columns path (relative to the file) and label (the class's name), and a
      directory of parquet files as Hugging Face's `datasets` writes them, or one such file. Their test split is, in
      CSV, the rows of the column split, and of parquet the files, called test, val, validation or valid; else it is
      drawn as above.
    - tar archives as webdataset lays them out, read without unpacking: one `.tar`, several as train-{000..099}.tar, or
      a directory of them. Members whose names agree up to the first dot belong together: an image, and its class, a
      number or a word in a `.cls`, or `label` (else `class`) in a `.json`. `classes.txt` names numbers, a line each.

    Of two such parts, test images and validation images, the latter become `val`.
    `image_size` (one number or height and width) defaults to the images' own if all of them share one of at most
    64, else to 224. Training images larger than 64 are read with a random resized crop, or with
    `image_transform(image, rng)` on Pillow images; others are resized and cut as `read_image` does it, with
    `fit_options` as its arguments. An unreadable image is an error, unless `skip_corrupt`:
    then it is left out and listed in the split's `skipped`. Who reads images only once, with a mean and std that are
    known, gives these as `statistics`: images of folders and tables are then decoded when they are read and not
    before (but with `skip_corrupt`). The processes of a `group`, which all have to call this with the same arguments,
    share the decoding. Raises DataError with a one-line message.
    """
    try:
        if src == "shapes":
            data = load_shapes(image_size, seed, group.leads)
        elif (batches := cifar10_batches(src, cache_dir)) is not None:
            data = load_cifar10(batches, image_size, fit_options)
        else:
            path = existing(src)
            kind, find = layout(path, skip_corrupt)
            numbered = number_classes(path, *find(path), val_fraction, seed)
            reading = Reading(image_size, skip_corrupt, image_transform, fit_options or {}, statistics, group)
            data = load_listings(kind, path, *numbered, reading)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or src}: {error.strerror or error}") from error
    return data if statistics is None else replace(data, mean=statistics[0], std=statistics[1])


def cifar10_batches(src: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """The directory of CIFAR-10's files if that is what `src` names; downloaded if need be."""
    if src == "cifar10":
        cache = Path(cache_dir) if cache_dir is not None else cache_directory()
        return find_cifar10(cache) or fetch_cifar10(cache)
    path = existing(src)
    batches = find_cifar10(path)
    return batches if batches == path or not (path / "train").is_dir() else None


def existing(src: str | os.PathLike[str]) -> Path:
    """`src` as the path of a directory or a table. Raises DataError saying what it is instead."""
    path = Path(src).expanduser()
    expected = "expected shapes, cifar10, a directory, or a .csv, .parquet or .tar file"
    if "{" in path.name and path.suffix.lower() == ".tar" and not path.exists():
        return path
    if not path.exists():
        raise DataError(f"no data at {src}: {expected}" + nearest(str(src), ("shapes", "cifar10")))
    if path.is_file() and path.suffix.lower() in ARCHIVES:
        raise DataError(f"{src} is an archive: unpack it and give the directory (of shards, decompress each to a .tar)")
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() in (".csv", ".parquet", ".tar")):
        raise DataError(f"{src} is a file, {expected}")
    return path


def layout(path: Path, skip_corrupt: bool) -> tuple[str, Finder]:
    """What kind of source lies at `path`, and the function that finds its images. Raises DataError for two kinds."""
    if path.suffix.lower() == ".csv" and path.is_file():
        return "csv", read_csv
    finders: dict[str, Finder] = {"parquet": find_in_parquet, "tar": partial(find_in_tar, skip_corrupt=skip_corrupt)}
    if not path.is_dir():
        return (kind := path.suffix.lower().removeprefix(".")), finders[kind]
    files = {"parquet": parquet_files(path), "tar": files_of(path, ".tar")}
    found = {f"{kind} files": some[0].relative_to(path).as_posix() for kind, some in files.items() if some}
    packed = next((file for file in path.iterdir() if file.name.lower().endswith(COMPRESSED)), None)
    image = first_image(path) if found or packed else None
    if packed and not image:
        raise DataError(f"{packed} is compressed: decompress it (a .tar is read without unpacking it)")
    if not found:
        return "folder", find_in_folder
    if len(found := {**({"images": image} if image else {}), **found}) > 1:
        both = " and ".join(f"{kind} ({name})" for kind, name in found.items())
        raise DataError(f"{path} holds both {both}, expected one of the two")
    kind = "tar" if files["tar"] else "parquet"
    return kind, finders[kind]


def default_augment(data: Data) -> Augment:
    """The training recipe for `data`: flips, and for small photographs a shift by up to an eighth (pad-and-crop)."""
    drawn = data.fingerprint.startswith("shapes-")  # already in random places, with nothing to spare at the edges
    padding = min(data.image_size) // 8 if max(data.image_size) <= SMALL and not drawn else 0
    return Augment(data.mean, data.std, flip=True, padding=padding, num_classes=len(data.class_names))
