"""A CSV file that lists images, with their classes in words."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tinyvit.data.base import DataError
from tinyvit.data.sources.listing import part_of
from tinyvit.data.stored import Rows, Texts

LONGEST = 1 << 20  # characters of a line


def read_csv(path: Path) -> tuple[dict[str, Rows], Sequence[str]]:
    """The rows of each split, all of them "train" without a column of that name, and no order. Raises DataError."""
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
    if "train" not in parts:
        found = f"only {', '.join(parts)}" if parts else "no row at all"
        raise DataError(f"{path} has no row with the split train, found {found}")
    return {part: Rows(path.parent, *columns) for part, columns in parts.items()}, ()


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
