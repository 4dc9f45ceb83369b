"""Data sets in several files, the shards, whose names say which part of the data they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tinyvit.data.base import DataError
from tinyvit.data.sources.listing import one_of_each, part_of

MOST_SHARDS = 100_000  # that a pattern may name
RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


def files_of(path: Path, suffix: str) -> list[Path]:
    """The files of a data set: `path` itself, those that it names in braces, or those in it or in the folders in it."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        return expanded(path)
    found = sorted(path.glob(f"*{suffix}")) or sorted(path.glob(f"*/*{suffix}"))
    return [file for file in found if file.is_file() and not file.name.startswith(".")]


def expanded(pattern: Path) -> list[Path]:
    """The files that a name such as train-{000..099}.tar stands for. Raises DataError, also for one that is missing."""
    names = [""]
    *pieces, last = RANGE.split(pattern.name)
    for text, first, end in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        if not 0 <= int(end) - int(first) < MOST_SHARDS // len(names):
            raise DataError(
                f"{pattern} has the range {first}..{end}, expected 1 to {MOST_SHARDS} files from low to high"
            )
        digits = max(len(first), len(end)) if "0" in (first[0], end[0]) else 1
        names = [f"{name}{text}{i:0{digits}}" for name in names for i in range(int(first), int(end) + 1)]
    if not pieces or "{" in "".join(pieces[::3]) + last:
        raise DataError(f"{pattern} has braces in which no range of numbers stands: expected train-{{000..099}}.tar")
    files = [pattern.with_name(name + last) for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"no data at {missing[0]}, one of {len(files)} files that {pattern.name} names")
    return files


def by_split(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, which is a word of a file's name or its folder's.

    All are "train" where none says so, and where they were given by their names and are of one split. Raises DataError
    for files of no split beside others, and for one that is missing from a directory.
    """
    if path.is_dir() and (missing := missing_shard(files)):
        raise DataError(f"{path} lacks {missing.relative_to(path).as_posix()}")
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(split_name(path, file), []).append(file)
    if set(by_name) == {""} or (len(by_name) == 1 and not path.is_dir()):
        by_name = {"train": list(files)}
    if "" in by_name:
        other = by_name[""][0]
        raise DataError(f"{other} belongs to no split, as other files do: expected a name with train, val or test")
    parts = {part: by_name[name] for part, name in one_of_each(path, by_name).items()}
    if "train" not in parts:
        raise DataError(f"{path} has {files[0].suffix[1:]} files of {', '.join(parts)}, but none of train")
    if len(folders := {file.parent for file in parts["train"]}) > 1:
        names = ", ".join(sorted(folder.name for folder in folders))
        raise DataError(f"{path} holds several data sets, expected one of them: {names}")
    return parts


def missing_shard(files: Sequence[Path]) -> Path | None:
    """The first that is not there of the files that names such as train-00000-of-00002.parquet count."""
    matches = [(file.parent, re.fullmatch(r"(.+-)(\d+)-of-(\d+)", file.stem)) for file in files]
    suffix = files[0].suffix
    heads = dict.fromkeys((folder, match[1], len(match[2]), match[3]) for folder, match in matches if match)
    expected = (
        folder / f"{name}{i:0{digits}}-of-{count}{suffix}"
        for folder, name, digits, count in heads
        for i in range(int(count))
    )
    present = set(files)
    return next((file for file in expected if file not in present), None)


def split_name(source: Path, file: Path) -> str:
    """ "train" of pets-train-00000-of-00001.parquet and of train/0000.parquet; "" where neither says a split.

    Folders outside the source say nothing.
    """
    inside = (
        [file.stem] if source in (file, file.parent) or source.parent == file.parent else [file.stem, file.parent.name]
    )
    words = (match[0] for name in inside for match in re.finditer(r"[A-Za-z]+(_(set|images|data))?", name))
    return next(filter(part_of, words), "")
