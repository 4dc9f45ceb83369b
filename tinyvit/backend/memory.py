"""Which memory the process keeps: what is freed, so that each step works in the pages of the step before."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from typing import Any

import numpy as np

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER = -1  # trimming: the manual's word for off
_LARGE, _OLD_LIMIT = 1 << 30, 1 << 25  # bytes; glibc before 2.26 takes no mmap threshold above 32 MiB


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of returning it to the system and to share it among threads.

    Otherwise every large array is mapped afresh, and each of its pages costs a fault and is zeroed: a tenth of a
    training step, and up to a fifth of predictions. Other C libraries, and a process whose environment tunes malloc
    itself, are left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  (only glibc has it)
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _LARGE) or mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)


def drop_pages(array: Any) -> None:
    """If the array is mapped, give back the memory of its file's pages, which lose what was written into them."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)
