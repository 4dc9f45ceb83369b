"""Labelled images that are not decoded yet: their names and where their bytes lie, in arrays, not in an object each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from tinyvit.data.image import StoredImage


class Texts(Sequence[str]):
    """Strings, one after the other in a single buffer: 8 bytes each beyond their letters, where a `str` takes 50."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._letters, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

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


@dataclass(frozen=True)
class Listing:
    """The images of one split, those at `places`, (N,) integers, of a list; their classes are `labels` (N,) int64.

    `files` are the names of all of the list, relative to `root`. Of images that are no files of their own `contents`
    gives the bytes by their place; their names then only tell them apart. `no_images` are files that were passed over,
    `skipped` images that were left out on request, because they cannot be read.
    """

    root: Path
    files: Sequence[str]
    places: np.ndarray
    labels: np.ndarray
    contents: Callable[[int], bytes] | None = None
    no_images: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, i: int) -> str:
        """Its name relative to `root`."""
        return self.files[self.places[i]]

    def name(self, i: int) -> str:
        """What error messages call the image."""
        return str(self.root / self.file(i))

    def image(self, i: int) -> Path | StoredImage:
        """Where its bytes are."""
        if self.contents is None:
            return self.root / self.file(i)
        return StoredImage(self.name(i), partial(self.contents, int(self.places[i])))

    def take(self, positions: np.ndarray) -> Self:
        """The images at `positions`, in that order."""
        return replace(self, places=self.places[positions], labels=self.labels[positions])
