"""Labelled images that are not decoded yet: their names and where their bytes lie, in arrays, not in an object each."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from tinyvit.data.image import StoredImage
from tinyvit.files.reading import open_regular


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


class Contents(Protocol):
    """The bytes of images that are no files of their own."""

    def read(self, i: int) -> bytes:
        """Those of image i. Raises OSError."""
        ...

    def take(self, positions: np.ndarray) -> Self:
        """The images at `positions`, in that order."""
        ...


@dataclass(frozen=True)
class Members:
    """Images that are parts of larger files.

    Image i is `size[i]` bytes of `archives[archive[i]]` from byte `offset[i]` on; all three are (N,) integers.
    """

    archives: tuple[Path, ...]
    archive: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError, also where the archive has become shorter."""
        path = self.archives[self.archive[i]]
        with open_regular(path, buffering=0) as file:
            file.seek(self.offset[i])
            content = file.read(self.size[i])
        if len(content) < self.size[i]:
            raise OSError(errno.EIO, "it has become shorter since it was opened", str(path))
        return content

    def take(self, positions: np.ndarray) -> Self:
        """The images at `positions`, in that order."""
        return replace(self, archive=self.archive[positions], offset=self.offset[positions], size=self.size[positions])


@dataclass(frozen=True)
class Listing:
    """The images of one split: `files` relative to `root`, and their classes, `labels` (N,) int64.

    `contents` are the bytes of images that are no files of their own; their names then only tell them apart.
    `drawn` is true of a split that was drawn from the training images. `no_images` are files that were passed over,
    `skipped` images that were left out on request, because they cannot be read.
    """

    root: Path
    files: Sequence[str]
    labels: np.ndarray
    contents: Contents | None = None
    drawn: bool = False
    no_images: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """What error messages call the image."""
        return str(self.root / self.files[i])

    def image(self, i: int) -> Path | StoredImage:
        """Where its bytes are."""
        if self.contents is None:
            return self.root / self.files[i]
        return StoredImage(self.name(i), partial(self.contents.read, i))

    def take(self, positions: np.ndarray) -> Self:
        """The images at `positions`, in that order."""
        files = Texts(self.files[i] for i in positions)
        contents = None if self.contents is None else self.contents.take(positions)
        return replace(self, files=files, labels=self.labels[positions], contents=contents)
