"""What is shown of a model and of its outputs, as arrays."""

from __future__ import annotations

import numpy as np

from tinyvit.engine.tensor import Array, Tensor
from tinyvit.models.inspection import visit_attention
from tinyvit.models.vit import VisionTransformer

BINS = 15  # of a reliability diagram, as in Guo et al.
COMPONENTS = 28  # filters shown in the ViT paper's figure 7


def head_attention(model: VisionTransformer, images: Tensor | Array) -> np.ndarray:
    """How much each head of each block lets the tokens that the classifier reads draw on each patch.

    These are the class token and a distilled model's second one; with average pooling the mean of all patches.

    Args:
        images: (B, C, H, W), floating.

    Returns:
        (depth, B, heads, rows, columns) float64. What is missing to a sum of 1 goes to prefix tokens.
    """
    config, rows = model.config, []
    read = slice(0, 1 + config.distilled) if config.global_pool == "token" else slice(config.num_prefix_tokens, None)

    def visit(weights: Tensor) -> None:  # (B, heads, N, N)
        shares = weights.numpy()[:, :, read, config.num_prefix_tokens :].mean(axis=2, dtype=np.float64)
        rows.append(shares.reshape(*shares.shape[:2], *config.grid_size))

    visit_attention(model, images, visit)
    return np.stack(rows)


def attention_distance(model: VisionTransformer, images: Tensor | Array) -> np.ndarray:
    """The mean distance, in pixels, between a patch and the patches that it attends to (the ViT paper, figure 7).

    For each head: the distances of all patches' centres, weighted by the attention weights and summed over the keys,
    averaged over queries and images. Weights that go to prefix tokens count as no distance.

    Returns:
        (depth, heads) float64.
    """
    config = model.config
    ys, xs = np.indices(config.grid_size).reshape(2, -1)
    heights, widths = (size / count for size, count in zip(config.image_size, config.grid_size, strict=True))
    distance = np.hypot((ys[:, None] - ys) * heights, (xs[:, None] - xs) * widths)  # (patches, patches)
    means, prefix = [], config.num_prefix_tokens

    def visit(weights: Tensor) -> None:  # (B, heads, N, N)
        between = weights.numpy()[:, :, prefix:, prefix:].astype(np.float64)
        means.append((between * distance).sum(axis=3).mean(axis=(0, 2)))

    visit_attention(model, images, visit)
    return np.stack(means)


def filter_components(model: VisionTransformer, count: int = COMPONENTS) -> np.ndarray:
    """The principal components of the patch embedding's filters (the ViT paper, figure 7), the largest first.

    Returns:
        (count or fewer, h, w, C) float64, each of Euclidean norm 1; the sign makes the largest entry positive.

    Raises:
        ValueError: the patches are those of a feature map.
    """
    if model.config.feature_chans != model.config.in_chans:
        raise ValueError("the filters of a model whose patches come from a convolutional stem are no images")
    weight = model.patch_embed.proj.weight.numpy().astype(np.float64)  # (D, C, h, w)
    flat = weight.reshape(len(weight), -1)
    components = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)[2][:count]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return (components * np.sign(largest)).reshape(-1, *weight.shape[1:]).transpose(0, 2, 3, 1)


def position_similarity(model: VisionTransformer) -> np.ndarray:
    """The cosine similarity of the position embeddings of each two patches (the ViT paper, figure 7).

    Returns:
        (rows, columns, rows, columns) float64, from -1 to 1.

    Raises:
        ValueError: a model without position embeddings.
    """
    if model.pos_embed is None:
        raise ValueError("a model without position embeddings (pos_embed 'none') has no similarities of them")
    rows, columns = model.config.grid_size
    embeddings = model.pos_embed.numpy()[0, -rows * columns :].astype(np.float64)
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    return (unit @ unit.T).reshape(rows, columns, rows, columns)


def calibrate(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> np.ndarray:
    """How well the highest probabilities (N, K) tell how often they are right (Guo et al. 2017, arXiv:1706.04599).

    Returns:
        (bins, 3) float64, for bins of equal width in the confidence, from 0 to 1: the mean confidence and the accuracy,
        NaN where a bin is empty, and the number of images.
    """
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (lower, upper], as in the paper
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence, accuracy = (np.bincount(bin_of, x, bins) / count for x in (confidence, hit))
    return np.stack([mean_confidence, accuracy, count], axis=1)


def calibration_error(bins: np.ndarray) -> float:
    """The expected calibration error of what `calibrate` gave: the gap in each bin, weighted by its images."""
    confidence, accuracy, count = bins.T
    gaps = np.nan_to_num(np.abs(confidence - accuracy))
    return float((gaps * count).sum() / max(count.sum(), 1))


def project(features: np.ndarray) -> np.ndarray:
    """Features (N, D) on their two principal components (N, 2)."""
    centred = features - features.mean(axis=0, dtype=np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    return centred @ directions[:, :-3:-1]
