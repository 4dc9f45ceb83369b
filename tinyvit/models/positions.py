"""Position embeddings that are computed, not learned."""

from __future__ import annotations

import numpy as np


def sincos2d(grid_size: tuple[int, int], dim: int, length: int, temperature: float = 10_000.0) -> np.ndarray:
    """Fixed position embeddings: sines and cosines of a patch's column and row.

    From Chen et al. 2021 (arXiv:2104.02057), in the form of Beyer et al. 2022 (arXiv:2205.01580).

    Args:
        grid_size: rows and columns of patches.
        dim: a quarter of it is the number of frequencies, which go from 1 to 1 / temperature.
        length: number of tokens; those before the patches get zeros.

    Returns:
        (1, length, dim) float32.
    """
    y, x = np.mgrid[: grid_size[0], : grid_size[1]].reshape(2, -1, 1)
    omega = temperature ** -(np.arange(dim // 4) / max(dim // 4 - 1, 1))
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    prefix = np.zeros((length - len(table), dim))
    return np.concatenate([prefix, table])[None].astype(np.float32)
