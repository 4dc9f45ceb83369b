"""Image folders: `train/CLASS/*` with `test/CLASS/*` (or val), or just `CLASS/*`, split here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinyvit.data.base import DataError
from tinyvit.data.sources.listing import TEST_NAMES, Found, Listing, classes_without, held_out_parts, split_classes

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


def find_in_folder(root: Path, val_fraction: float, seed: int) -> Found:
    """The images of an image folder; see tinyvit.data.load_data. Raises DataError."""
    train_root, test_roots = find_splits(root)
    classes = class_folders(train_root)
    if len(classes) < 2:
        found = f"only {classes[0].name}" if classes else "none"
        raise DataError(f"{train_root} must hold at least two class folders with images, found {found}")
    names = tuple(folder.name for folder in classes)
    listing = list_images(train_root, names)
    if missing := classes_without(listing, names):
        raise DataError(f"class folder {train_root / missing[0]} has no images (looked for {' '.join(ENDINGS)})")
    if not test_roots:
        return names, *split_classes(listing, names, val_fraction, seed), None
    for folder in (folder for root in test_roots for folder in class_folders(root)):
        if folder.name not in names:
            raise DataError(f"{folder} is a class that {train_root} does not have (it has {', '.join(names)[:200]})")
    tests = [list_images(root, names) for root in test_roots]
    for test in tests:
        if not test.files:
            raise DataError(f"the class folders of {test.root} have no images (looked for {' '.join(ENDINGS)})")
    return names, listing, tests[0], tests[1] if tests[1:] else None


def find_splits(root: Path) -> tuple[Path, list[Path]]:
    """The folder of the training classes, and those of test and validation classes, the preferred one first."""
    folders = {folder.name.lower(): folder for folder in class_folders(root)}
    tests = [name for name in TEST_NAMES if name in folders and class_folders(folders[name])]
    if "train" in folders:
        return folders["train"], [folders[name] for name in held_out_parts(root, tests)]
    if tests and set(folders) <= set(TEST_NAMES):
        raise DataError(f"{root} has {folders[tests[0]].name}/ but no train/")
    return root, []


def class_folders(folder: Path) -> list[Path]:
    """Visible folders in `folder` by name; links that lead back up to it are left out."""
    here = folder.resolve()
    return sorted(
        child
        for child in folder.iterdir()
        if not child.name.startswith((".", "__")) and child.is_dir() and not here.is_relative_to(child.resolve())
    )


def list_images(root: Path, names: tuple[str, ...]) -> Listing:
    """The images in and below each class folder, by name; links to folders are not followed."""
    files, labels = [], []
    for label, name in enumerate(names):
        files += images_below(root, name)
        labels += [label] * (len(files) - len(labels))
    order = sorted(range(len(files)), key=lambda i: (labels[i], files[i]))
    return Listing(root, files, np.array(labels, dtype=np.int64)).take(order)


def images_below(root: Path, name: str) -> Iterator[str]:
    """The images in and below the folder `name` of `root`, relative to `root`, in no order."""
    for folder, folders, members in os.walk(root / name):
        folders[:] = [child for child in folders if not child.startswith(".")]
        inside = Path(folder).relative_to(root).as_posix()
        yield from (f"{inside}/{m}" for m in members if m.lower().endswith(ENDINGS) and not m.startswith("."))


def first_image(root: Path) -> str | None:
    """An image in or below the folders of `root`, relative to it, if there is one."""
    return next((image for folder in class_folders(root) for image in images_below(root, folder.name)), None)
