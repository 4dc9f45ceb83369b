"""Images in tar archives as webdataset lays them out, read where they lie: 0001.jpg and 0001.cls (or 0001.json).

What comes before the first dot of a member's name is its key; members of one key belong together. The class of an image
is what its `.cls` holds, a number or a word; without one, `label` (else `class`) of the object in its `.json`. Classes
that are numbers are named by the lines of `classes.txt` (or `classnames.txt`) beside the archives, else by the numbers.
Other members are passed over.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tinyvit.data.base import DataError
from tinyvit.data.image import known_endings
from tinyvit.data.sources.shards import by_split, files_of
from tinyvit.data.splits import SKIP_HINT, UNCOUNTED, in_threads
from tinyvit.data.stored import Rows, Texts
from tinyvit.files.fields import checked, either, integer, text
from tinyvit.files.reading import LARGEST_JSON, open_regular, parse_json, read_text
from tinyvit.files.tar import Member, read_members

NAMES = ("classes.txt", "classnames.txt")
LARGEST_IMAGE = 1 << 29  # bytes
LARGEST_CLS = 1000
LABEL = either(integer(0, 2**31 - 1), text)


@dataclass
class Shard:
    """What was found in one archive: the images, and what was left out."""

    names: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    offset: array[int] = field(default_factory=partial(array, "q"))
    size: array[int] = field(default_factory=partial(array, "q"))
    skipped: list[str] = field(default_factory=list)


def find_in_tar(path: Path, skip_corrupt: bool) -> tuple[dict[str, Rows], Sequence[str]]:
    """The images of tar archives by part, and the order of their classes; see tinyvit.data.load_data.

    Only the headers of the members and their labels are read. What is wrong with an archive or a member is an error,
    unless `skip_corrupt`. Raises DataError.
    """
    base = path if path.is_dir() else path.parent
    parts = by_split(path, files_of(path, ".tar"))
    rows = {part: read_part(base, files, skip_corrupt) for part, files in parts.items()}
    order = sorted({name for part in rows.values() for name in part.classes if name.isdecimal()}, key=int)
    if order and (words := class_names(base, int(order[-1]))):
        for part in rows.values():
            part.classes = [words[int(name)] if name.isdecimal() else name for name in part.classes]
        order = [words[int(number)] for number in order]
    return rows, order


def read_part(base: Path, files: Sequence[Path], skip_corrupt: bool) -> Rows:
    """The images of all archives of a part, in their order."""
    names, classes, skipped = Texts(), list[str](), list[str]()
    archive, offset, size = array("i"), array("q"), array("q")
    for number, shard in enumerate(in_threads(partial(read_shard, skip_corrupt=skip_corrupt), files)):
        for name in shard.names:
            names.append(f"{files[number].relative_to(base).as_posix()}, {name}")
        classes += shard.classes
        archive.extend([number] * len(shard.names))
        offset += shard.offset
        size += shard.size
        skipped += shard.skipped

    def read(i: int) -> bytes:
        path = files[archive[i]]
        with open_regular(path, buffering=0) as file:
            file.seek(offset[i])
            content = file.read(size[i])
        if len(content) < size[i]:
            raise OSError(errno.EIO, "it has become shorter since it was opened", str(path))
        return content

    return Rows(base, names, classes, read, tuple(skipped))


def read_shard(path: Path, skip_corrupt: bool) -> Shard:
    """The images of one archive and their classes. Raises DataError, unless `skip_corrupt`."""
    shard = Shard()
    groups: dict[str, dict[str, Member]] = {}

    def wrong(what: str, problem: object) -> None:
        if not skip_corrupt:
            raise DataError(f"{path}{what}: {problem}{SKIP_HINT}")
        shard.skipped.append(f"{'' if what else UNCOUNTED}{path}{what} ({problem})")

    with open_regular(path, buffering=4096) as file:
        try:
            for member in read_members(file):
                try:
                    sort(member, groups)
                except ValueError as error:
                    wrong(f", {member.name}", error)
        except ValueError as error:
            wrong("", error)
        for key, group in groups.items():
            image, note = group.get("image"), group.get(".cls") or group.get(".json")
            try:
                label = class_of(file, note) if note else ""
            except ValueError as error:
                if note and (image or ".cls" in group):  # a .json alone may say anything
                    wrong(f", {note.name}", error)
                continue
            if "refused" in group and not (image and label):  # which is said already
                continue
            if not image:
                named = note or group["view"]
                wrong(f", {named.name}", f"there is no image {key}.jpg (.png, .webp, …)")
            elif not label:
                wrong(f", {image.name}", f"it has no class: expected {key}.cls or {key}.json beside it")
            else:
                shard.names.append(image.name)
                shard.classes.append(sys.intern(label))
                shard.offset.append(image.offset)
                shard.size.append(image.size)
    if not shard.names and not shard.skipped:
        wrong("", "it has no images with a class beside them, such as 0001.jpg and 0001.cls")
    return shard


def sort(member: Member, groups: dict[str, dict[str, Member]]) -> None:
    """Put a member that counts into the group of its key: as "image", ".cls" or ".json", or as "view".

    A view is an image whose ending says more, such as 0001.left.jpg. One that cannot be used becomes "refused". Raises
    ValueError for the first of a key.
    """
    folder, slash, name = member.name.rpartition("/")
    stem, dot, ending = name.partition(".")
    key, ending = f"{folder}{slash}{stem}", f".{ending.lower()}"
    if ending in known_endings():
        what = "image"
    elif ending in (".cls", ".json"):
        what = ending
    else:
        what = "view" if Path(ending).suffix in known_endings() else ""
    if not (stem and dot and what) or member.kind == "a folder":
        return
    group = groups.setdefault(key, {})
    problem = ""
    if what != "view" and member.kind:
        problem = f"it is {member.kind}, expected a regular file"
    elif what != "view" and what in group:
        problem = f"it is the second {what} of {key}"
    elif what == "image" and member.size > LARGEST_IMAGE:
        problem = f"it has {member.size} bytes, at most {LARGEST_IMAGE} are read"
    said = "refused" in group
    group["refused" if problem else what] = member
    if problem and not said:
        raise ValueError(problem)


def class_of(file: BinaryIO, member: Member) -> str:
    """The class that a `.cls` or a `.json` member holds. Raises ValueError."""
    if member.name.lower().endswith(".cls"):
        return class_word(content_of(file, member, LARGEST_CLS))
    note = parse_json(content_of(file, member, LARGEST_JSON))
    key = "label" if "label" in note else "class"
    return class_word(str(checked(note, {key: LABEL}, required=[key])[key]))


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


def class_names(base: Path, highest: int) -> Sequence[str]:
    """The names of the classes from 0 to `highest` at least; none without a file of them. Raises DataError."""
    file = next((base / name for name in NAMES if (base / name).is_file()), None)
    if file is None:
        return []
    try:
        lines = [line.strip() for line in read_text(file).removeprefix("\ufeff").rstrip().split("\n")]
    except ValueError as error:
        raise DataError(f"cannot read {file}: {error}") from None
    first: dict[str, int] = {}
    for place, line in enumerate(lines):
        if not line or first.setdefault(line, place) != place:
            raise DataError(f"{file}, line {place + 1} is {line!r}, expected the name of a class, each once")
    if highest >= len(lines):
        raise DataError(f"{file} names {len(lines)} classes, but there are images of class {highest}")
    return lines
