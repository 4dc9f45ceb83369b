"""Images in tar archives as webdataset lays them out, read where they lie: 0001.jpg and 0001.cls (or 0001.json).

What comes before the first dot of a member's name is its key; members of one key belong together. The class of an image
is what its `.cls` holds, a number or a word; without one, `label` (else `class`) of the object in its `.json`. Classes
that are numbers are named by the lines of `classes.txt` (or `classnames.txt`) beside the archives, else by the `class`
beside each `label`, if these are one to one, else by the numbers. Other members are passed over.
"""

from __future__ import annotations

import contextlib
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyvit.data.base import DataError
from tinyvit.data.image import known_endings
from tinyvit.data.sources.csv_table import Rows, number_classes
from tinyvit.data.sources.listing import Listings
from tinyvit.data.sources.shards import by_split, files_of
from tinyvit.data.splits import SKIP_HINT, in_threads
from tinyvit.data.stored import Members, Texts
from tinyvit.files.fields import checked, either, integer, text
from tinyvit.files.reading import LARGEST_JSON, open_regular, parse_json, read_text
from tinyvit.files.tar import Member, read_members

NAMES = ("classes.txt", "classnames.txt")
LARGEST_IMAGE = 1 << 29  # bytes
LARGEST_CLS = 1000
LABEL = either(integer(0, 2**31 - 1), text)


@dataclass
class Shard:
    """What was found in one archive; `named` are the numbers and words that stood together in `.json` members."""

    names: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    offset: array[int] = field(default_factory=partial(array, "q"))
    size: array[int] = field(default_factory=partial(array, "q"))
    named: set[tuple[str, str]] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)


def find_in_tar(path: Path, val_fraction: float, seed: int, *, skip_corrupt: bool) -> Listings:
    """The images of tar archives; see tinyvit.data.load_data.

    Only the headers of the members and their labels are read. What is wrong with an archive or a member is an error,
    unless `skip_corrupt`. Raises DataError.
    """
    parts = by_split(path, files_of(path, ".tar"))
    base = path if path.is_dir() else path.parent
    named: set[tuple[str, str]] = set()
    rows = {part: read_part(base, files, skip_corrupt, named) for part, files in parts.items()}
    numbers = sorted({name for part in rows.values() for name in part.classes if name.isdecimal()}, key=int)
    order = numbers
    if words := class_names(base, numbers, named):
        for part in rows.values():
            part.classes = [words.get(name, name) for name in part.classes]
        order = [words[number] for number in numbers]
    return number_classes(path, rows, order, val_fraction, seed)


def read_part(base: Path, files: Sequence[Path], skip_corrupt: bool, named: set[tuple[str, str]]) -> Rows:
    """The images of all archives of a part, in their order; adds to `named`."""
    names, classes, skipped = Texts(), list[str](), list[str]()
    archive, offset, size = array("i"), array("q"), array("q")
    for number, shard in enumerate(in_threads(partial(read_shard, skip_corrupt=skip_corrupt), files)):
        for name in shard.names:
            names.append(f"{files[number].relative_to(base).as_posix()}, {name}")
        classes += shard.classes
        archive.extend([number] * len(shard.names))
        offset += shard.offset
        size += shard.size
        named |= shard.named
        skipped += shard.skipped
    members = Members(tuple(files), *(np.array(column, np.int64) for column in (archive, offset, size)))
    return Rows(names, classes, members, tuple(skipped))


def read_shard(path: Path, skip_corrupt: bool) -> Shard:
    """The images of one archive and their classes. Raises DataError, unless `skip_corrupt`."""
    shard = Shard()
    images: dict[str, Member] = {}
    labels: dict[str, str] = {}
    notes: dict[str, Member] = {}  # the .json of each key
    others: dict[str, str] = {}  # images whose endings say more, such as 0001.left.jpg

    def wrong(what: str, problem: str) -> None:
        if not skip_corrupt:
            raise DataError(f"{path}{what}: {problem}{SKIP_HINT}")
        shard.skipped.append(f"{path}{what} ({problem})")

    def sort(member: Member) -> None:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        key, ending = f"{folder}{slash}{stem}", f".{ending.lower()}"
        if not (stem and dot) or member.kind == "a folder":
            return
        if ending not in known_endings() and ending not in (".cls", ".json"):
            if Path(ending).suffix in known_endings():
                others[key] = member.name
            return
        if member.kind:
            raise ValueError(f"it is {member.kind}, expected a regular file")
        if key in (labels if ending == ".cls" else notes if ending == ".json" else images):
            raise ValueError(f"it is the second {'image' if ending in known_endings() else ending} of {key}")
        if ending == ".cls":
            labels[key] = label_of(file, member)
        elif ending == ".json":
            notes[key] = member
        elif member.size > LARGEST_IMAGE:
            raise ValueError(f"it has {member.size} bytes, at most {LARGEST_IMAGE} are read")
        else:
            images[key] = member

    with open_regular(path, buffering=4096) as file:
        try:
            for member in read_members(file):
                try:
                    sort(member)
                except ValueError as error:
                    wrong(f", {member.name}", str(error))
        except ValueError as error:
            wrong("", str(error))
        for key, image in images.items():
            try:
                label = labels.pop(key, "") or noted_label(file, notes[key], shard)
            except KeyError:
                wrong(f", {image.name}", f"it has no class: expected {key}.cls or {key}.json beside it")
            except ValueError as error:
                wrong(f", {notes[key].name}", str(error))
            else:
                shard.names.append(image.name)
                shard.classes.append(sys.intern(label))
                shard.offset.append(image.offset)
                shard.size.append(image.size)
        lonely = {key: f"{key}.cls" for key in labels}
        for key, note in notes.items():
            if key not in images and has_label(file, note):
                lonely[key] = note.name
    for key, name in {**lonely, **others}.items():
        if key not in images:
            wrong(f", {name}", f"there is no image {key}.jpg (.png, .webp, …)")
    if not images and not shard.skipped:
        wrong("", "it has no images with a class beside them, such as 0001.jpg and 0001.cls")
    return shard


def label_of(file: BinaryIO, member: Member) -> str:
    """The class that a `.cls` member holds. Raises ValueError."""
    return class_word(content_of(file, member, LARGEST_CLS))


def noted_label(file: BinaryIO, member: Member, shard: Shard) -> str:
    """The class that a `.json` member holds; a word beside a number is added to `shard.named`. Raises ValueError."""
    note = parse_json(content_of(file, member, LARGEST_JSON))
    key = "label" if "label" in note else "class"
    label = class_word(str(checked(note, {key: LABEL}, required=[key])[key]))
    if key == "label" and label.isdecimal() and isinstance(word := note.get("class"), str):
        shard.named.add((label, class_word(word)))
    return label


def has_label(file: BinaryIO, member: Member) -> bool:
    """Whether a `.json` member holds a class."""
    with contextlib.suppress(ValueError):
        return bool(noted_label(file, member, Shard()))
    return False


def content_of(file: BinaryIO, member: Member, most: int) -> str:
    """The text in a member. Raises ValueError."""
    if member.size > most:
        raise ValueError(f"it has {member.size} bytes, at most {most} are read")
    file.seek(member.offset)
    try:
        return file.read(member.size).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def class_word(content: str) -> str:
    """A class as a single word or number, 7 for 007. Raises ValueError."""
    word = content.removeprefix("\ufeff").strip()
    if not word or len(word.splitlines()) > 1 or (word.startswith("-") and word[1:].isdecimal()):
        raise ValueError(f"it holds {word[:40]!r}, expected the number of a class from 0 on, or its name on one line")
    return str(int(word)) if word.isdecimal() else word


def class_names(base: Path, numbers: Sequence[str], named: set[tuple[str, str]]) -> Mapping[str, str]:
    """The names of `numbers`: what a file gives, else what is `named` if that is one to one. Raises DataError."""
    file = next((base / name for name in NAMES if (base / name).is_file()), None)
    if file is None or not numbers:
        words = dict(named)
        one_to_one = set(words) == set(numbers) and len(named) == len(words) == len(set(words.values()))
        return words if one_to_one else {}
    try:
        lines = [line.strip() for line in read_text(file).removeprefix("\ufeff").rstrip().split("\n")]
    except ValueError as error:
        raise DataError(f"cannot read {file}: {error}") from None
    first: dict[str, int] = {}
    for place, line in enumerate(lines):
        if not line or first.setdefault(line, place) != place:
            raise DataError(f"{file}, line {place + 1} is {line!r}, expected the name of a class, each once")
    if int(numbers[-1]) >= len(lines):
        raise DataError(f"{file} names {len(lines)} classes, but there are images of class {numbers[-1]}")
    return {number: lines[int(number)] for number in numbers}
