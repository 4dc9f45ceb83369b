"""Weights for a changed configuration: another image size, patch size or head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyvit.models.config import ViTConfig
from tinyvit.models.positions import sincos2d


def adapt(state: Mapping[str, Any], old: ViTConfig, new: ViTConfig, interpolation: str = "bicubic") -> dict[str, Any]:
    """The weights of a model of the config `old` for one of the config `new`.

    Position embeddings follow the grid of patches, patch kernels their size; a head for another number of classes, or
    over another pre_logits layer, is one of zeros. What else differs is left as it is.

    Args:
        state: arrays by state-dict name; none is changed.
        interpolation: of the position embeddings, "bicubic" as in timm or "bilinear" as in the original JAX code.

    Raises:
        ValueError: an unknown interpolation.
    """
    if interpolation not in MATRICES:
        raise ValueError(f"interpolation {interpolation!r} given, expected {' or '.join(MATRICES)}")
    state = dict(state)
    prefix = 0 if old.no_embed_class else old.num_prefix_tokens
    if new.grid_size != old.grid_size and shape(state, "pos_embed") == (1, prefix + old.num_patches, old.embed_dim):
        if new.pos_embed == "sincos2d":
            state["pos_embed"] = sincos2d(new.grid_size, new.embed_dim, prefix + new.num_patches)
        else:
            state["pos_embed"] = resize_positions(
                state["pos_embed"], old.grid_size, new.grid_size, prefix=prefix, interpolation=interpolation
            )
    kernel = "patch_embed.proj.weight"
    if new.patch_size != old.patch_size and shape(state, kernel) == (old.embed_dim, old.feature_chans, *old.patch_size):
        state[kernel] = resize_kernel(state[kernel], new.patch_size)
    if new.representation_size != old.representation_size:
        state = {name: array for name, array in state.items() if not name.startswith("pre_logits.")}
    if (new.num_classes, new.representation_size) != (old.num_classes, old.representation_size):
        state = {name: array for name, array in state.items() if not name.startswith(("head.", "head_dist."))}
        state |= zero_heads(new)
    return state


def shape(state: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def zero_heads(config: ViTConfig) -> dict[str, np.ndarray]:
    """Weights and biases of new heads; none for a model without classes."""
    widths = {"head": config.representation_size or config.embed_dim}
    if config.distilled:
        widths["head_dist"] = config.embed_dim
    heads = {}
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
    """Position embeddings (1, prefix + rows * columns, D) of the grid `old` for the grid `new`.

    The first `prefix` ones belong to no patch and stay. "bicubic" is timm's rule (torch's with antialiasing),
    "bilinear" that of the original JAX code (corners stay corners, as in scipy.ndimage.zoom).
    """
    matrix = MATRICES[interpolation]
    grid = positions[0, prefix:].reshape(*old, -1).astype(np.float64)
    rows, columns = matrix(old[0], new[0]), matrix(old[1], new[1])
    resized = np.einsum("ih,jw,hwd->ijd", rows, columns, grid, optimize=True).reshape(1, new[0] * new[1], -1)
    return np.concatenate([positions[:, :prefix], resized.astype(positions.dtype)], axis=1)


def resize_kernel(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A patch kernel (D, C, h, w) for patches of another size: (D, C, *size).

    Beyer et al. 2022 (FlexiViT, arXiv:2212.08013), section 3.4: with B the matrix that resizes a patch, the kernel that
    gives resized patches (as nearly as possible) the same embedding is the pseudo-inverse of B^T times the old one.
    """
    rows, columns = (np.linalg.pinv(bicubic(old, new).T) for old, new in zip(kernel.shape[2:], size, strict=True))
    return np.einsum("ih,jw,dchw->dcij", rows, columns, kernel, optimize=True).astype(kernel.dtype)


def bicubic(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that resizes a row by Keys' cubic kernel (a = -1/2), widened when the row gets shorter."""
    scale = old / new
    width = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    x = np.abs(np.arange(old) + 0.5 - centres[:, None]) / width
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def bilinear(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that resizes a row linearly, its first and last values staying first and last."""
    places = np.linspace(0, old - 1, new)[:, None]
    return np.maximum(0.0, 1.0 - np.abs(np.arange(old) - places))


MATRICES = {"bicubic": bicubic, "bilinear": bilinear}
