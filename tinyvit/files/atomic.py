"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tinyvit.errors import UsageError


def check_output(option: str, path: Path | None) -> None:
    """Refuse a path that an option gives for a file where no file can be, before work is done for it.

    Raises UsageError; None is no path.
    """
    if path is not None and path.is_dir():
        raise UsageError(f"{option} {path} is a directory, expected the name of a file")
    if path is not None and not (folder := _without_links(path).parent).is_dir():
        raise UsageError(f"{option} {path}: there is no directory {folder}")
    if path is not None and path.is_symlink() and path.is_file() and str(path).startswith(("/dev/", "/proc/")):
        raise UsageError(
            f"{option} {path} is the open file {_without_links(path)}, expected a file or a pipe of its own"
        )


def _without_links(path: Path) -> Path:
    """The file that a link leads to, whether or not it is there."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` only once it is whole and on disk.

    When the block raises, `path` is as it was before and nothing is left beside it. A process killed inside the
    block leaves the hidden file `.NAME.PID.tmp`. A link stays one: the file that it leads to is replaced. A pipe or a
    device, such as /dev/stdout, has no contents to keep: `path` itself is given, and written to straight.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    path = _without_links(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(beside)):
            raise OSError(error.errno, f"could not write: {error.strerror}", str(path)) from None
        raise
    if os.name == "posix":  # the new name is on disk only when its directory is
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give a directory beside `path` that becomes `path` once the block is done."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # what a killed process left
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
