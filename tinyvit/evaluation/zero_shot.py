"""Classes that are given by the embeddings of their names, for models that were trained with a text tower.

CLIP: Radford et al. 2021, arXiv:2103.00020, section 3.1. SigLIP: Zhai et al. 2023, arXiv:2303.15343, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyvit.checkpoints.readers.npz import read_npz
from tinyvit.evaluation.classify import Outputs
from tinyvit.evaluation.metrics import EvaluationError

CLIP_SCALE = 100.0  # of OpenAI's models, and the largest that their training allows


@dataclass(frozen=True)
class TextLabels:
    """Names and the unit embeddings of what describes them.

    Attributes:
        names: K names.
        embeddings: (K, D) float64.
        scale: the factor of the cosine similarities (CLIP's exp(logit_scale), SigLIP's too).
        bias: SigLIP's logit_bias; None for CLIP.
    """

    names: tuple[str, ...]
    embeddings: np.ndarray
    scale: float
    bias: float | None

    def probabilities(self, outputs: Outputs) -> np.ndarray:
        """(N, K) float64: CLIP's, which sum to 1, or SigLIP's, each for itself. Raises EvaluationError."""
        images = outputs.logits if outputs.logits.shape[1] else outputs.features.astype(np.float64)
        if images.shape[1] != self.embeddings.shape[1]:
            raise EvaluationError(
                f"the labels' embeddings have {self.embeddings.shape[1]} values, the model's {images.shape[1]}: "
                "they must be of its own text tower"
            )
        unit = images / np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1e-12)
        logits = self.scale * unit @ self.embeddings.T
        if self.bias is not None:
            return 1 / (1 + np.exp(-np.clip(logits + self.bias, -700, 700)))
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)


def read_labels(path: Path, similarity: Mapping[str, float]) -> TextLabels:
    """Labels in an .npz file: `names` (K,), `embeddings` (K, D), and perhaps `scale` and `bias`.

    The embeddings are normalised. Scale and bias are otherwise the model's `similarity`, and without that CLIP's usual.
    Raises CheckpointError for a file that cannot be read, EvaluationError for others.
    """
    arrays = read_npz(path)
    names, embeddings = (arrays.get(name, np.zeros(0)) for name in ("names", "embeddings"))
    if names.dtype.kind != "U" or names.ndim != 1 or embeddings.dtype.kind != "f" or embeddings.ndim != 2:
        raise EvaluationError(f"{path}: expected names (K,) of text and embeddings (K, D) of numbers")
    if not len(names) == len(embeddings) > 0:
        raise EvaluationError(f"{path}: it has {len(names)} names for {len(embeddings)} embeddings")
    numbers = {"scale": CLIP_SCALE} | dict(similarity)
    for name in ("scale", "bias"):
        if name in arrays:
            if arrays[name].size != 1 or arrays[name].dtype.kind not in "fiu":
                raise EvaluationError(f"{path}: {name} is not a single number")
            numbers[name] = float(arrays[name].item())
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and norms.all() and np.isfinite(list(numbers.values())).all()):
        raise EvaluationError(f"{path}: its numbers are not finite, or an embedding is zero")
    unit = embeddings.astype(np.float64) / norms
    return TextLabels(tuple(names.tolist()), unit, numbers["scale"], numbers.get("bias"))
