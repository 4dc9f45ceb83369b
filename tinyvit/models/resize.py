"""Weights for a changed configuration: another image size, patch size or head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyvit.models.config import ViTConfig
from tinyvit.models.parts import sincos2d


def resize_weights(
    state: Mapping[str, Any], old: ViTConfig, new: ViTConfig, interpolation: str = "bicubic"
) -> dict[str, Any]:
    """The weights of a model with the config `old`, for one with the config `new`.

    Position embeddings are resized to the new grid of patches, and patch kernels to the new patch size. A head for
    another number of classes, or on another pre_logits layer, is zeros. Other weights stay as they are.

    Args:
        state: arrays by state-dict name; none is changed.
        old, new: the configs.
        interpolation: of the position embeddings, "bicubic" as in timm or "bilinear" as in the original JAX code.

    Returns:
        arrays by state-dict name.

    Raises:
        ValueError: an unknown interpolation.
    """
    if interpolation not in MATRICES:
        raise ValueError(f"interpolation {interpolation!r} given, expected {' or '.join(MATRICES)}")
    state = dict(state)
    prefix = 0 if old.no_embed_class else old.num_prefix_tokens
    if new.grid_size != old.grid_size and _shape(state, "pos_embed") == (1, prefix + old.num_patches, old.embed_dim):
        if new.pos_embed == "sincos2d":
            state["pos_embed"] = sincos2d(new.grid_size, new.embed_dim, prefix + new.num_patches)
        else:
            state["pos_embed"] = resize_positions(
                state["pos_embed"], old.grid_size, new.grid_size, prefix=prefix, interpolation=interpolation
            )
    kernel, before = "patch_embed.proj.weight", (old.embed_dim, old.feature_chans, *old.patch_size)
    if new.patch_size != old.patch_size and _shape(state, kernel) == before:
        state[kernel] = resize_kernel(state[kernel], new.patch_size)
    if new.representation_size != old.representation_size:
        state = {name: array for name, array in state.items() if not name.startswith("pre_logits.")}
    if (new.num_classes, new.representation_size) != (old.num_classes, old.representation_size):
        state = {name: array for name, array in state.items() if not name.startswith(("head.", "head_dist."))}
        state |= zero_heads(new)
    return state


def _shape(state: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    """The shape of a weight, None if there is no such weight."""
    return tuple(state[name].shape) if name in state else None


def zero_heads(config: ViTConfig) -> dict[str, np.ndarray]:
    """Weights and biases of new heads, by state-dict name; none for a model without classes."""
    widths = {"head": config.representation_size or config.embed_dim}
    if config.distilled:
        widths["head_dist"] = config.embed_dim
    heads: dict[str, np.ndarray] = {}
    for name, width in widths.items() if config.num_classes else ():
        heads[f"{name}.weight"] = np.zeros((config.num_classes, width), np.float32)
        heads[f"{name}.bias"] = np.zeros(config.num_classes, np.float32)
    return heads


def resize_positions(
    positions: np.ndarray,
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    prefix: int = 1,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Position embeddings for another grid of patches.

    Args:
        positions: (1, prefix + rows * columns, D).
        old, new: rows and columns of the grids.
        prefix: number of first embeddings that belong to no patch; these stay.
        interpolation: "bicubic" is timm's rule (torch's with antialiasing), "bilinear" that of the original JAX code
            (corners stay corners, as in scipy.ndimage.zoom).

    Returns:
        (1, prefix + new rows * columns, D).
    """
    matrix = MATRICES[interpolation]
    grid = positions[0, prefix:].reshape(*old, -1).astype(np.float64)
    rows, columns = matrix(old[0], new[0]), matrix(old[1], new[1])
    resized = np.einsum("ih,jw,hwd->ijd", rows, columns, grid, optimize=True).reshape(1, new[0] * new[1], -1)
    return np.concatenate([positions[:, :prefix], resized.astype(positions.dtype)], axis=1)


def resize_kernel(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A patch kernel (D, C, h, w) for patches of another size: (D, C, *size).

    Beyer et al. 2022 (FlexiViT, arXiv:2212.08013), section 3.4: let B be the matrix that resizes a patch. The
    pseudo-inverse of B^T times the old kernel gives resized patches the same embedding, as nearly as possible.
    """
    rows, columns = (np.linalg.pinv(bicubic(old, new).T) for old, new in zip(kernel.shape[2:], size, strict=True))
    return np.einsum("ih,jw,dchw->dcij", rows, columns, kernel, optimize=True).astype(kernel.dtype)


def bicubic(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that resizes a row by Keys' cubic kernel (a = -1/2), which is wider for a shorter row."""
    scale = old / new
    width = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    x = np.abs(np.arange(old) + 0.5 - centres[:, None]) / width
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def bilinear(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that resizes a row linearly; its first and last values stay."""
    places = np.linspace(0, old - 1, new)[:, None]
    return np.maximum(0.0, 1.0 - np.abs(np.arange(old) - places))


MATRICES = {"bicubic": bicubic, "bilinear": bilinear}
