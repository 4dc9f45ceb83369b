"""The members of a tar archive (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU), without unpacking it.

Python's tarfile keeps an object a member, ends in silence at a damaged header, and takes several times as long.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512  # bytes; a header is one block, and contents are filled up to whole ones
LARGEST_EXTENSION = 1 << 20  # bytes of a pax header or a long name
LARGEST_END = 1 << 20  # bytes of zeros after the end mark: writers fill their last record
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe"}


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `size` bytes from byte `offset` of the archive on; `kind` is "" for a regular file."""

    name: str
    kind: str
    offset: int
    size: int


def read_members(file: BinaryIO) -> Iterator[Member]:
    """The members of an archive in their order; `file` may be read elsewhere between them.

    Raises:
        ValueError: it is no tar archive, compressed, damaged or cut off. The members before the damage were given.
    """
    length = os.fstat(file.fileno()).st_size
    everywhere: dict[str, str] = {}
    here: dict[str, str] = {}
    at = 0
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise ValueError(f"it is cut off: no end mark in {length} bytes")
        if not any(header):
            return _check_end(file, at)
        start, kind, size = at + BLOCK, header[156:157], _size_of(header, at)
        if kind in b"xgLK":
            if size > LARGEST_EXTENSION:
                raise ValueError(f"the header at byte {at} has {size} bytes more, at most {LARGEST_EXTENSION} are read")
            if len(content := file.read(size)) < size:
                raise ValueError(f"it is cut off within the header at byte {at}")
            if kind == b"L":
                here["path"] = _text(content)
            elif kind != b"K":
                (everywhere if kind == b"g" else here).update(_pax(content, at))
            at = start + _whole_blocks(size)
            continue
        fields = {**everywhere, **here}
        here = {}
        if not fields.get("size", "0").isdecimal() or len(fields.get("size", "")) > 19:
            raise ValueError(f"the header at byte {at} has the size {fields['size'][:40]!r}, expected a whole number")
        name, size = fields.get("path") or _name_of(header), int(fields.get("size", size))
        stored = 0 if kind in KINDS else size
        if size > length or start + stored > length:
            raise ValueError(f"it is cut off within {name}: {size} bytes from byte {start} on, of {length} in all")
        yield Member(name, _kind_of(kind, name, fields), start, size)
        at = start + _whole_blocks(stored)


def _size_of(header: bytes, at: int) -> int:
    """The size that a header gives. Raises ValueError for bytes that are no header."""
    try:
        if _octal(header[148:156]) == 256 + sum(header[:148]) + sum(header[156:]):  # its own checksum reads as spaces
            return int.from_bytes(header[125:136], "big") if header[124] == 0x80 else _octal(header[124:136])
    except ValueError:
        pass
    if at:
        raise ValueError(f"it is damaged: no header at byte {at}")
    raise ValueError("it is compressed: decompress it" if header.startswith(COMPRESSED) else "it is no tar archive")


def _octal(field: bytes) -> int:
    """A number in octal digits, ended by spaces or zero bytes. Raises ValueError."""
    digits = field.partition(b"\0")[0].strip() or b"0"
    if not digits.isdigit():
        raise ValueError(f"{digits!r} is no octal number")
    return int(digits, 8)


def _name_of(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _kind_of(kind: bytes, name: str, fields: dict[str, str]) -> str:
    if kind == b"S" or "sparse" in fields:
        return "sparse"
    if kind in b"0\0" + b"7":
        return "a folder" if name.endswith("/") else ""
    return KINDS.get(kind, f"of the unknown kind {kind!r}")


def _pax(content: bytes, at: int) -> dict[str, str]:
    """Of the records "LENGTH KEY=VALUE\\n" of a pax header, those that matter here. Raises ValueError."""
    found = {}
    start = 0
    while start < len(content):
        digits = content[start : start + 8].partition(b" ")[0]
        end = start + int(digits) if digits.isdigit() else 0
        key, equals, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            raise ValueError(f"it is damaged: no pax header at byte {at}")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = ""
        start = end
    return found


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_end(file: BinaryIO, at: int) -> None:
    """Raise ValueError if anything but zeros follows the end mark at byte `at`."""
    file.seek(at)
    rest = file.read(LARGEST_END + 1)
    if len(rest) > LARGEST_END or any(rest):
        raise ValueError(f"it goes on after its end mark at byte {at}, as archives that were joined by cat do")
