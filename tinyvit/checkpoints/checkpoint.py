"""Saving and loading weights, whole or not at all, and never through pickle.

A checkpoint of ours is one safetensors file: the weights under their state-dict names, and in its metadata one
JSON object (key "tinyvit") with everything else that is needed to use them: the model's config, the class names,
the size, mean and std of its images. A training checkpoint (`last.safetensors`) also carries tensors named
`optimizer.…` and `ema.…`, and its position in the run under "progress". Other libraries' files are for `formats`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from tinyvit.models.config import ViTConfig
    from tinyvit.models.vit import VisionTransformer

BEST, LAST = "best.safetensors", "last.safetensors"
TRAINING_PREFIXES = ("optimizer.", "ema.", "step.")


class CheckpointError(Exception):
    """A checkpoint that cannot be read or does not fit; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights and what is needed to use them on an image.

    `split` says how the training run divided a folder without a test part (`val_fraction`, `seed`), so that an
    evaluation divides it alike. `names_known` is false where nothing said what the classes are, and `class_names` only
    number them.
    """

    path: Path
    config: ViTConfig
    state: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    split: dict[str, Any] = dataclasses.field(default_factory=dict)
    names_known: bool = True

    @property
    def mean(self) -> tuple[float, ...]:
        """One float per channel in 0..1 units."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """One float per channel in 0..1 units."""
        return self.preprocessing.std

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the model's images."""
        return self.config.image_size  # type: ignore[return-value]  # the config keeps pairs

    def build(self, *, interpolation: str = "bicubic", copy: bool = True, **overrides: Any) -> VisionTransformer:
        """The model with its weights, in eval mode; `overrides` replace fields of its config.

        Another `image_size` or `patch_size` resizes the position embeddings (`interpolation` as in `adapt`) and the
        patch kernels. Another `num_classes` gives a head of zeros; 0 leaves it out. With `copy=False` the model keeps
        the arrays of `state`. Raises CheckpointError when weights are missing, left over, of another shape or not
        finite, TypeError or ValueError for overrides that make no model.
        """
        from tinyvit.models.resize import adapt
        from tinyvit.models.vit import VisionTransformer
        from tinyvit.nn import no_init

        config = self.config.replace(**overrides)
        for name, array in self.state.items():
            if not np.all(np.isfinite(array)):
                raise CheckpointError(f"{self.path}: {name} holds values that are not finite")
        state = adapt(self.state, self.config, config, interpolation)
        with no_init():
            model = VisionTransformer(config)
        try:
            model.load_state_dict(state, copy=copy)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        model.class_names = self.class_names if config.num_classes == self.config.num_classes else ()
        model.preprocessing = self.preprocessing
        return model.eval()


def describe(
    config: ViTConfig,
    class_names: tuple[str, ...],
    preprocessing: Preprocessing,
    split: Mapping[str, Any],
    names_known: bool = True,
) -> dict[str, Any]:
    """The metadata from which a Checkpoint is read back."""
    return {
        "config": config.to_dict(),
        "class_names": list(class_names),
        "names_known": names_known,
        **preprocessing.to_dict(),
        "split": dict(split),
    }
