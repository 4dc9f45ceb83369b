"""How images are prepared for a model: the same as for the images that its weights were trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input; its size is the model's `config.image_size`.

    Attributes:
        mean, std: one float per channel in 0..1 units: (pixels / 255 - mean) / std.
        crop_pct: the side of the crop over that of the resized image; None: `data.read_image` chooses it.
        crop_mode: "center" keeps the aspect ratio when resizing, "squash" does not.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | None = None
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    def __call__(self, image: Image, image_size: int | tuple[int, int]) -> np.ndarray:
        """Prepare an RGB image for a model of `image_size` (height, width): (C, H, W) float32."""
        from tinyvit.data.augment import normalise
        from tinyvit.data.base import pair
        from tinyvit.data.image import fit, to_array

        return normalise(to_array(fit(image, pair(image_size), **self.fit))[None], self.mean, self.std)[0]

    @property
    def fit(self) -> dict[str, Any]:
        """How an image is resized and cut: arguments of `data.read_image`, and `fit_options` of `data.load_data`."""
        crop = {} if self.crop_pct is None else {"crop_pct": self.crop_pct}
        return {**crop, "crop_mode": self.crop_mode, "interpolation": self.interpolation}

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """`mean` and `std`."""
        return self.mean, self.std

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `Preprocessing(**values)` takes them back."""
        return {**self.fit, "mean": list(self.mean), "std": list(self.std)}


def share(part: int, whole: int) -> float:
    """`part / whole`, such that `int(part / share)` is `whole` in spite of rounding."""
    return part / whole if int(part / (part / whole)) == whole else part / (whole + 0.5)
