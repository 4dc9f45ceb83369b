"""Transforms of one Pillow image; sizes are (height, width), random decisions come from an explicit generator."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from tinyvit.data.base import DataError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
LONGEST = 16  # a strip longer than this many times its width is trimmed before it is resized to cover a square


def resampling(name: str) -> Image.Resampling:
    if name not in INTERPOLATIONS:
        raise DataError(f"interpolation {name!r} given, expected one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


def resize(image: Image.Image, size: tuple[int, int], interpolation: str = "bicubic") -> Image.Image:
    """Resize to exactly `size`."""
    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), resampling(interpolation))


def resize_to_cover(image: Image.Image, size: tuple[int, int], interpolation: str = "bicubic") -> Image.Image:
    """Resize, keeping the aspect ratio, to the smallest image that covers `size`."""
    image = centre_crop(image, trimmed_size(image.height, image.width))
    return resize(image, covering_size(image.height, image.width, size), interpolation)


def trimmed_size(height: int, width: int) -> tuple[int, int]:
    """What is left of an image of this size once a very long one is trimmed."""
    longest = LONGEST * min(height, width)
    return min(height, longest), min(width, longest)


def covering_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the aspect ratio of `height` x `width` that covers `size`."""
    if size[0] * width >= size[1] * height:
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle `size` of an image that is at least as large."""
    height, width = size
    if height > image.height or width > image.width:
        raise DataError(f"cannot crop {height}x{width} from an image of {image.height}x{image.width}")
    if (width, height) == image.size:
        return image
    top, left = margin(image.height, height), margin(image.width, width)
    return image.crop((left, top, left + width, top + height))


def margin(outer: int, inner: int) -> int:
    """What a centre crop of length `inner` leaves out before it."""
    return round((outer - inner) / 2)


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> Image.Image:
    """Resize a random part of the image to `size` (Szegedy et al. 2014, "Going deeper with convolutions", section 6).

    `scale` bounds the part's share of the area, `ratio` its width / height (drawn evenly on a log scale).
    """
    area = image.width * image.height
    for _ in range(10):
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        part = area * rng.uniform(*scale)
        width, height = round(math.sqrt(part * aspect)), round(math.sqrt(part / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            break
    else:  # a very long image: the largest centred part whose ratio is allowed
        width = min(image.width, max(1, round(image.height * ratio[1])))
        height = min(image.height, max(1, round(image.width / ratio[0])))
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    box = (left, top, left + width, top + height)
    return image.resize((size[1], size[0]), resampling(interpolation), box=box)
