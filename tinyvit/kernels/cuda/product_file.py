"""The algorithms of matrix products that a search has measured (`cublas.search`), in a file beside CuPy's kernels.

Only a search writes it, and a process reads it once: sums in another order have other bits, so that runs with the same
file, and all without one, agree.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import numpy as np

from tinyvit.files import atomic
from tinyvit.files.text import one_line
from tinyvit.kernels import cuda

SIZE = 64  # bytes of a cublasLtMatmulAlgo_t


def path() -> Path:
    return cuda.cache_file("tinyvit_products.json")


def find(product: str) -> np.ndarray | None:
    """The bytes of the algorithm for a product, which is named with its device and cuBLASLt's version."""
    found = _read().get(product)
    return None if found is None else np.frombuffer(bytes.fromhex(found), np.uint8).copy()


def keep(product: str, algorithm: np.ndarray) -> None:
    _read.cache_clear()  # another process may have kept more since
    _read()[product] = algorithm.tobytes().hex()
    path().parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path(), json.dumps(_read(), indent=1))


@functools.cache
def _read() -> dict[str, str]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
        if not all(len(bytes.fromhex(x)) == SIZE for x in found.values()):
            raise ValueError(f"expected algorithms of {SIZE} bytes")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path()} is ignored: {one_line(error)}", stacklevel=2)
        return {}
    return found
