"""Images listed in tables, with their classes in words: a CSV file, and what other tables share with it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from tinyvit.data.base import DataError
from tinyvit.data.sources.listing import Listings, part_of, split_classes
from tinyvit.data.stored import Contents, Listing, Texts

LONGEST = 1 << 20  # characters of a line


@dataclass
class Rows:
    """The images of one split as a Listing has them, but with a word for the class of each."""

    files: Sequence[str]
    classes: Sequence[str]
    contents: Contents | None = None
    skipped: tuple[str, ...] = ()

    def numbered(self, root: Path, names: Sequence[str]) -> Listing:
        """The listing with each class as its place in `names`."""
        index = {name: i for i, name in enumerate(names)}
        labels = np.fromiter((index[c] for c in self.classes), np.int64, len(self.classes))
        return Listing(root, self.files, labels, self.contents, skipped=self.skipped)


def number_classes(
    source: Path, parts: Mapping[str, Rows], order: Sequence[str], val_fraction: float, seed: int
) -> Listings:
    """The images of the table(s) at `source`, by part: "train" and perhaps "val" and "test".

    The classes are those of the training images: first those in `order`, then the others by the alphabet. Without
    other parts, `val_fraction` of each class is kept for one. Raises DataError.
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
    root = source if source.is_dir() else source.parent
    listings = {part: rows.numbered(root, names) for part, rows in parts.items()}
    if len(listings) == 1:
        return Listings(names, *split_classes(listings["train"], names, val_fraction, seed))
    return Listings(names, listings["train"], listings.get("test"), listings.get("val"))


def find_in_csv(path: Path, val_fraction: float, seed: int) -> Listings:
    """The images of a CSV file; see tinyvit.data.load_data. Raises DataError."""
    parts = read_csv(path)
    if "train" not in parts:
        found = f"only {', '.join(parts)}" if parts else "no row at all"
        raise DataError(f"{path} has no row with the split train, found {found}")
    return number_classes(path, parts, (), val_fraction, seed)


def read_csv(path: Path) -> dict[str, Rows]:
    """The rows of each split, all of them "train" without a column of that name. Raises DataError."""
    parts: dict[str, tuple[Texts, list[str]]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(lines_of(file), strict=True)
            columns = reader.fieldnames or []
            if not {"path", "label"} <= set(columns):
                raise DataError(
                    f"{path} begins with {', '.join(map(repr, columns)) or 'nothing'}, expected a header with the "
                    "columns path and label (and split, if it has one)"
                )
            if twice := [name for name in ("path", "label", "split") if columns.count(name) > 1]:
                raise DataError(f"{path} has several columns called {twice[0]}")
            for row in reader:
                split = checked(row, columns, f"{path}, line {reader.line_num}")
                files, classes = parts.setdefault(split, (Texts(), []))
                files.append(row["path"])
                classes.append(sys.intern(row["label"].strip()))
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}, after line {reader.line_num}: {error}") from None
    return {part: Rows(*columns) for part, columns in parts.items()}


def lines_of(file: TextIO) -> Iterator[str]:
    """The lines of a file. Raises csv.Error for one that is no line of a table."""
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise csv.Error(f"a line has more than {LONGEST} characters")
        yield line


def checked(row: dict[str, str], columns: Sequence[str], where: str) -> str:
    """The split of a row that has all that it needs. Raises DataError saying `where` it has not."""
    if None in row or None in row.values():
        raise DataError(f"{where} has another number of values than the header has columns ({len(columns)})")
    for column in ("path", "label"):
        if not row[column].strip():
            raise DataError(f"{where} has no {column}")
    part = part_of(row.get("split", "train"))
    if part is None:
        raise DataError(f"{where} has the split {row['split']!r}, expected train, val or test")
    return part
