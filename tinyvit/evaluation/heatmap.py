"""Attention over images: a heat map drawn where the model looked, in the image as it was before it was cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinyvit.data.image import seen_part
from tinyvit.evaluation.classify import model_input
from tinyvit.models.inspection import rollout
from tinyvit.models.vit import VisionTransformer

# Stops of a colour map from black over violet and red to pale yellow, each lighter than the one before.
STOPS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
SMALL = 256  # pixels: the side to which smaller images are enlarged
STRENGTH = (0.2, 0.7)  # shares of the heat's colour in the image's, where it is coldest and hottest


def draw(image: Image.Image, heat: np.ndarray, part: tuple[tuple[float, float], tuple[float, float]]) -> Image.Image:
    """A heat map over an image.

    Args:
        image: RGB.
        heat: (rows, columns), spread from its least to its greatest value over the colours.
        part: (top, bottom) and (left, right) in the image's pixels: where `heat` lies. What lies outside, which
            the model did not see, turns grey and dark.

    Returns:
        an RGB image of the same size, or a whole number of times larger where it is small.
    """
    factor = math.ceil(SMALL / max(image.size))
    (top, bottom), (left, right) = (whole_pixels(factor * start, factor * stop) for start, stop in part)
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    grey = image.convert("L").convert("RGB")
    canvas = Image.blend(Image.new("RGB", image.size), grey, 0.4)

    levels = spread(heat, (bottom - top, right - left))
    colours = levels.copy()
    colours.putpalette(palette())
    share = levels.point([round(255 * (STRENGTH[0] + (STRENGTH[1] - STRENGTH[0]) * i / 255)) for i in range(256)])
    inside = Image.blend(grey, image, 0.5).crop((left, top, right, bottom))
    canvas.paste(Image.composite(colours.convert("RGB"), inside, share), (left, top))
    return canvas


def beside(image: Image.Image, heat: np.ndarray, part: tuple[tuple[float, float], tuple[float, float]]) -> Image.Image:
    """An image, the same with the heat map of `draw` over it, and a bar that says what the colours stand for.

    The arguments are those of `draw`; the heat is labelled in percent.
    """
    over = draw(image, heat, part)
    (width, height), gap, bar = over.size, 8, 14
    canvas = Image.new("RGB", (2 * width + 3 * gap + bar + 56, height), "white")
    canvas.paste(image.resize(over.size, Image.Resampling.NEAREST), (0, 0))
    canvas.paste(over, (width + gap, 0))
    scale = Image.linear_gradient("L").transpose(Image.Transpose.FLIP_TOP_BOTTOM).resize((bar, height))
    scale.putpalette(palette())
    canvas.paste(scale.convert("RGB"), (2 * width + 2 * gap, 0))
    text, font, left = ImageDraw.Draw(canvas), ImageFont.load_default(13), 2 * width + 3 * gap + bar
    text.text((left, 0), f"{heat.max():.2%}", "black", font)
    text.text((left, height), f"{heat.min():.2%}", "black", font, anchor="ld")
    return canvas


def rollout_beside(model: VisionTransformer, image: Image.Image) -> tuple[np.ndarray, Image.Image]:
    """Attention rollout (rows, columns) of an RGB image, and the image beside it; errors as `classify`."""
    heat = rollout(model, model_input(model, image))[0]
    assert model.preprocessing is not None  # model_input used it
    part = seen_part((image.height, image.width), model.config.image_size, **model.preprocessing.fit)
    return heat, beside(image, heat, part)


def coloured(heat: np.ndarray, low: float, high: float, scale: int) -> Image.Image:
    """A heat map alone, (rows, columns), with the colours spread over low ... high and `scale` pixels a value."""
    levels = np.clip((heat - low) / (high - low if high > low else 1.0), 0, 1)
    image = Image.fromarray(np.rint(255 * levels).astype(np.uint8))
    image.putpalette(palette())
    return image.convert("RGB").resize((scale * heat.shape[1], scale * heat.shape[0]), Image.Resampling.NEAREST)


def grid(tiles: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size in rows, on white."""
    width, height = tiles[0].width + gap, tiles[0].height + gap
    canvas = Image.new("RGB", (columns * width - gap, math.ceil(len(tiles) / columns) * height - gap), "white")
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (i % columns * width, i // columns * height))
    return canvas


def whole_pixels(start: float, stop: float) -> tuple[int, int]:
    """The nearest bounds of at least one pixel."""
    return round(start), max(round(stop), round(start) + 1)


def spread(heat: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """`heat` as grey levels 0 ... 255, smoothly enlarged to `size` (height, width)."""
    low, high = heat.min(), heat.max()
    levels = 255 * (heat - low) / (high - low if high > low else 1)
    large = Image.fromarray(levels.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
    return Image.fromarray(np.rint(np.clip(np.asarray(large), 0, 255)).astype(np.uint8))


def palette() -> list[int]:
    """Red, green and blue of 256 colours."""
    places = np.linspace(0, 255, len(STOPS))
    colours = [np.interp(np.arange(256), places, channel) for channel in zip(*STOPS, strict=True)]
    return np.rint(np.stack(colours, axis=1)).astype(int).ravel().tolist()
