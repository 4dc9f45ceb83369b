"""Labelled images that are not decoded yet: their names and where their bytes lie, in arrays, not in an object each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from tinyvit.data.image import StoredImage


class Texts(Sequence[str]):
    """Strings, one after the other in a single buffer: 8 bytes each beyond their letters, where a `str` takes 50."""

    def __init__(self) -> None:
        self._letters, self._ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        """Add a string; file names that are no text (surrogates) are kept as they are."""
        self._letters += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._letters))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"text {i} of {len(self)}")
        return self._letters[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


@dataclass
class Rows:
    """The images of one part of a data set: `files`, their names relative to `root`, and a word for the class of each.

    Of images that are no files of their own `contents` gives the bytes by their number; their names then only tell them
    apart. `skipped` are images that were left out on request, because they cannot be read, `no_images` files that were
    passed over.
    """

    root: Path
    files: Sequence[str]
    classes: Sequence[str]
    contents: Callable[[int], bytes] | None = None
    skipped: tuple[str, ...] = ()
    no_images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """Those of the rows at `places`, (N,) integers, and their classes as numbers, `labels` (N,) int64."""

    rows: Rows
    places: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, rows: Rows, names: Sequence[str]) -> Self:
        """All of the rows, each class as its place in `names`."""
        index, count = {name: i for i, name in enumerate(names)}, len(rows.classes)
        return cls(rows, np.arange(count), np.fromiter((index[c] for c in rows.classes), np.int64, count))

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, i: int) -> str:
        """Its name relative to `root`."""
        return self.rows.files[self.places[i]]

    def name(self, i: int) -> str:
        """What error messages call the image."""
        return str(self.rows.root / self.file(i))

    def image(self, i: int) -> Path | StoredImage:
        """Where its bytes are."""
        if self.rows.contents is None:
            return self.rows.root / self.file(i)
        return StoredImage(self.name(i), partial(self.rows.contents, int(self.places[i])))

    def take(self, positions: np.ndarray) -> Self:
        """The images at `positions`, in that order."""
        return replace(self, places=self.places[positions], labels=self.labels[positions])
