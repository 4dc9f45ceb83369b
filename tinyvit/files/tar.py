"""The members of a tar archive, without unpacking it.

Python's tarfile keeps an object a member, and ends in silence at a damaged header: here that is an error.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Self

from tinyvit.files.text import one_line

BLOCK = 512  # bytes: the end mark is at least one block of zeros
LARGEST_EXTENSION = 1 << 20  # bytes of a pax header or a long name, which tarfile reads whole
LARGEST_END = 1 << 20  # bytes of zeros in the end mark and after it: writers fill their last record
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
EXTENSIONS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
KINDS = {
    tarfile.LNKTYPE: "a link", tarfile.SYMTYPE: "a link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder", tarfile.FIFOTYPE: "a pipe",
}  # fmt: skip


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
    length, at = os.fstat(file.fileno()).st_size, 0  # `at` is where the next header begins
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", tarinfo=_Info) as archive:
            while (found := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all
                member = Member(found.name, _kind_of(found), found.offset_data, found.size)
                negative = archive.offset <= at  # it would lead back
                if negative or (not member.kind and member.offset + member.size > length):
                    raise ValueError(f"{member.name} has {member.size} bytes, the archive {length}")
                at = archive.offset
                yield member
    except Exception as error:  # what a damaged header says can make tarfile raise nearly anything
        if at:
            raise ValueError(f"it is cut off or damaged at byte {at}: {one_line(error)}") from None
        file.seek(0)
        if file.read(BLOCK).startswith(COMPRESSED):
            raise ValueError("it is compressed: decompress it") from None
        raise ValueError(f"it is no tar archive, or cut off: {one_line(error)}") from None
    _check_end(file, at)


class _Info(tarfile.TarInfo):
    """GNU writes times of access where POSIX has the beginning of a long name; Python's own takes them for that."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Self:  # type: ignore[override]
        info = super().frombuf(buf, encoding, errors)
        if buf[257:263] != b"ustar\0":
            info.name = buf[:100].partition(b"\0")[0].decode(encoding, errors)
        if info.type in EXTENSIONS and info.size > LARGEST_EXTENSION:
            raise ValueError(f"a header goes on for {info.size} bytes, at most {LARGEST_EXTENSION} are read")
        return info


def _kind_of(found: tarfile.TarInfo) -> str:
    if found.issparse():
        return "sparse"
    return "" if found.isreg() else KINDS.get(found.type, f"of the unknown kind {found.type!r}")


def _check_end(file: BinaryIO, at: int) -> None:
    """Raise ValueError unless an end mark is at byte `at`, and nothing but zeros follows it."""
    file.seek(at)
    rest = file.read(LARGEST_END + 1)
    if len(rest) < BLOCK or any(rest[:BLOCK]):
        raise ValueError(f"it is cut off or damaged at byte {at}: there is neither a header nor an end mark")
    if len(rest) > LARGEST_END or any(rest):
        raise ValueError(f"it goes on after its end mark at byte {at}, as archives that were joined by cat do")
