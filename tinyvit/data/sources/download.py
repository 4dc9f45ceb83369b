"""Fetching CIFAR-10: resumed where it broke off, checked, unpacked beside its place and renamed into it."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tinyvit.data.base import DataError
from tinyvit.files.atomic import new_directory
from tinyvit.files.bar import bar
from tinyvit.files.text import one_line

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as given on the page it comes from
CIFAR10_FOLDER = "cifar-10-batches-bin"

TRIES = 4
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 18


def cache_directory() -> Path:
    """$TINYVIT_CACHE, else `tinyvit` in the platform's cache directory."""
    if chosen := os.environ.get("TINYVIT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tinyvit"


def fetch_cifar10(cache: Path) -> Path:
    """Download CIFAR-10 into `cache`; returns the directory of its batch files. Raises DataError in one line."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        archive = cache / CIFAR10_URL.rpartition("/")[2]
        if not archive.exists():
            download(CIFAR10_URL, archive)
        check(archive, CIFAR10_MD5)
        folder = unpack(archive, CIFAR10_FOLDER)
        archive.unlink()
        return folder
    except (OSError, EOFError, zlib.error, http.client.HTTPException, tarfile.TarError, DataError) as error:
        alternatives = "give --data DIR with a copy of it, or --data shapes"
        raise DataError(f"cannot fetch CIFAR-10 into {cache}: {describe(error)}; {alternatives}") from error


def describe(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # of a URLError: the error that it wraps
    return one_line(reason if isinstance(reason, Exception) else error)


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`, which appears only once whole.

    What has arrived lies in `path` + ".part", and the next try or the next run goes on from there.
    """
    part = path.with_name(path.name + ".part")
    for attempt in range(TRIES):
        try:
            receive(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) or attempt == TRIES - 1 or not part.exists():
                raise
            time.sleep(2**attempt / 2)
    os.replace(part, path)


def check(path: Path, md5: str) -> None:
    """Remove a file whose MD5 sum is another, and raise DataError."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        path.unlink()
        raise DataError(f"{path.name} had the MD5 sum {found}, expected {md5}, and was removed")


def receive(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`; raises OSError when the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tinyvit"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing lies beyond what we have
            raise
        return
    with response:
        if response.status != 206:  # the server sends all of it again
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with bar(part.stem, total, before=have, unit="B") as done, open(part, "ab" if have else "wb") as file:
            while block := response.read(CHUNK):
                file.write(block)
                have += len(block)
                done(len(block))
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended after {have:,} of {total:,} bytes; run again to go on from there")


def unpack(archive: Path, folder: str) -> Path:
    """The directory `folder` out of a tar archive, placed beside it whole or not at all.

    It gets the files that lie directly in it, and nothing else of the archive.
    """
    target = archive.parent / folder
    with new_directory(target) as beside, tarfile.open(archive) as tar:
        for member in tar:  # without extractall, whose filter Python has from 3.11.4 on
            parent, _, name = member.name.removeprefix("./").rpartition("/")
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None and parent == folder and Path(name).name == name:
                with open(beside / name, "wb") as file:
                    shutil.copyfileobj(content, file)
        shutil.rmtree(target, ignore_errors=True)  # what lies in its place, now that the new one is whole
    return target
