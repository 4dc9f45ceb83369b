"""Reading regular files, and JSON of a limited size."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, BinaryIO

# A megabyte of JSON becomes at most some 25 MB of objects.
LARGEST_JSON = 8_000_000  # bytes


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading in binary mode.

    A named pipe or a device is refused: reading from it could block for ever or never end.

    Args:
        path: the file.
        buffering: as in `open`.

    Raises:
        OSError: the file cannot be opened, or it is not a regular file.
    """
    check_regular(path)
    return open(path, "rb", buffering)


def check_regular(path: str | os.PathLike[str]) -> int:
    """The size of a regular file in bytes, for readers that open the file themselves.

    Raises:
        OSError: there is no such file, or it is not a regular file.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        problem = "is a pipe, a socket or a device, expected a regular file"
        raise OSError(errno.EINVAL, problem, os.fspath(path))
    return status.st_size


def read_text(path: str | os.PathLike[str], most: int = LARGEST_JSON) -> str:
    """The text of a regular UTF-8 file of at most `most` bytes.

    Raises:
        OSError: the file cannot be opened, or it is not a regular file.
        ValueError: it is longer, or not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None


def parse_json(text: str) -> dict[str, Any]:
    """The object in a text of JSON.

    Raises:
        ValueError: the text is not JSON, nested too deeply, or not an object.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object")
    return content
