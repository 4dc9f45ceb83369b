"""A checkpoint: weights, and what is needed to use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.backend.memory import drop_pages
from tinyvit.errors import ReportedError
from tinyvit.files.fields import checked, list_of, number, one_of
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.models.resize import resize_weights
from tinyvit.models.vit import VisionTransformer
from tinyvit.nn import no_init

BEST, LAST = "best.safetensors", "last.safetensors"
LONGEST_MESSAGE = 500
TRAINING_PREFIXES = ("optimizer.", "ema.", "step.")


class CheckpointError(ReportedError):
    """A checkpoint that cannot be read or does not fit; the message is one line, LONGEST_MESSAGE characters at most."""

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:  # its start names the file, its end the cure
            message = f"{message[: LONGEST_MESSAGE - 203]} … {message[-200:]}"
        super().__init__(" ".join(message.split()))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights and what is needed to use them on an image.

    `split` says how the training run divided a folder without a test part (`val_fraction`, `seed`), so that an
    evaluation divides it alike, how many `images` there were to divide, and whether it so `held_out` images of a data
    set that has a test part. `names_known` is false where nothing said what the classes are, and `class_names` only
    number them. `similarity` says how a model that was trained with a text tower compares an image with a text: the
    "scale" of the cosine between them, and SigLIP's "bias".
    """

    path: Path
    config: ViTConfig
    state: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    split: dict[str, Any] = dataclasses.field(default_factory=dict)
    names_known: bool = True
    similarity: dict[str, float] = dataclasses.field(default_factory=dict)

    def build(self, *, interpolation: str = "bicubic", copy: bool = True, **overrides: Any) -> VisionTransformer:
        """The model with its weights, in eval mode.

        Args:
            interpolation: how position embeddings are resized for another `image_size`, as in `resize_weights`.
            copy: False lets the model keep the arrays of `state`.
            overrides: replace fields of the config. Another `image_size` or `patch_size` resizes position embeddings
                and patch kernels; another `num_classes` gives a head of zeros, 0 leaves it out.

        Raises:
            CheckpointError: weights are missing, left over, of another shape or not finite.
            TypeError, ValueError: overrides that make no model.
        """
        config = self.config.replace(**overrides)
        for name, array in self.state.items():
            if not np.all(np.isfinite(array)):
                raise CheckpointError(f"{self.path}: {name} holds values that are not finite")
            drop_pages(array)
        state = resize_weights(self.state, self.config, config, interpolation)
        with no_init():
            model = VisionTransformer(config)
        try:
            model.load_state_dict(state, copy=copy)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        model.class_names = self.class_names if config.num_classes == self.config.num_classes else ()
        model.preprocessing = self.preprocessing
        return model.eval()


# What preprocessing may be: a smaller crop_pct would resize an image to many times the pixels that are used.
PREPROCESSING = {
    "mean": list_of(number(-1e4, 1e4), 1, 1024),
    "std": list_of(number(1e-6, 1e4), 1, 1024),
    "crop_pct": number(0.1, 1),
    "crop_mode": one_of("center", "squash"),
    "interpolation": one_of("nearest", "bilinear", "bicubic", "lanczos"),
}


def checked_preprocessing(values: Mapping[str, Any], in_chans: int) -> Preprocessing:
    """Preprocessing from what a file says. Raises ValueError for values that no image can be prepared with."""
    found = checked(values, PREPROCESSING, required=("mean", "std"))
    for name in ("mean", "std"):
        if len(found[name]) != in_chans:
            raise ValueError(f"{name} has {len(found[name])} values for {in_chans} channels")
    return Preprocessing(**found)


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
