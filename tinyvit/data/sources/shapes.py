"""`shapes`: ten classes of small drawn images, for a first try and for tests that need no network.

Each image shows one shape in a random place, pose, size and colour, on a background with a colour gradient and
strokes, often with a stroke across it and always with noise. Shapes are signed distance functions (Inigo Quilez,
https://iquilezles.org/articles/distfunctions2d/): negative inside, in units of the shape's radius, and blurred over one
pixel at the edge, which is what smooths it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyvit.data.base import Data, chunks, pair, statistics_of
from tinyvit.data.splits import ArraySplit, in_threads
from tinyvit.files.bar import bar

TRAIN, TEST = 8_000, 2_000
CHUNK = 200  # images drawn at a time: what they need fits in a core's cache
STROKES = 2  # behind the shape


def disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.85


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.7) - 0.2


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.5, y))


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    diamond = 0.7071 * (x + np.abs(y) - 0.76)
    lobe = np.hypot(x - 0.38, y - 0.38) - 0.5374
    return np.minimum(diamond, lobe)


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return box(x, y, 0.72, 0.72)


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.5


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(box(x, y, 0.28, 0.95), box(x, y, 0.95, 0.28))


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, y) + fifth / 2) % fifth - fifth / 2)  # from the nearest point of the star
    radius = np.hypot(x, y)
    return 0.35 * (radius * np.cos(angle) - 1) + 0.936 * radius * np.sin(angle)


def arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    head = np.maximum(0.75 * np.abs(x) + 0.66 * (y - 0.95), 0.05 - y)
    return np.minimum(head, box(x, y + 0.4, 0.2, 0.55))


def hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.8 * (np.abs(x) - 0.8 * np.abs(y)) - 0.05, np.abs(y) - 0.85)


def box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


SHAPES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    disc, ring, crescent, heart, square, triangle, cross, star, arrow, hourglass,
)  # fmt: skip
CLASSES = tuple(shape.__name__ for shape in SHAPES)


def load_shapes(image_size: int | tuple[int, int] | None = None, seed: int = 0, shown: bool = True) -> Data:
    """8,000 training images drawn from `seed` and the same 2,000 test images every time, 32x32 by default."""
    size = pair(32 if image_size is None else image_size)
    train = ArraySplit(*draw(TRAIN, size, np.random.default_rng([0, seed]), shown), [])
    test = ArraySplit(*draw(TEST, size, np.random.default_rng([1]), shown), [])
    mean, std = statistics_of(train.images)
    return Data("shapes", train, test, CLASSES, mean, std, size, 3, f"shapes-2-{seed}", {"crop_pct": 1.0})


def draw(
    count: int, size: tuple[int, int], rng: np.random.Generator, shown: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """`count` images (N, 3, H, W) uint8 and their labels (N,) int64, classes evenly spread and in random order."""
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    images = np.empty((count, 3, *size), np.uint8)
    tasks = [(k, members) for k in range(len(SHAPES)) for members in chunks(np.flatnonzero(labels == k), CHUNK)]

    def work(task: tuple[tuple[int, np.ndarray], np.random.Generator]) -> None:
        (label, members), rng = task
        images[members] = draw_class(SHAPES[label], len(members), size, rng)

    drawn = in_threads(work, zip(tasks, rng.spawn(len(tasks)), strict=True))
    with bar("drawing shapes", count, shown) as done:
        for (_, members), _ in zip(tasks, drawn, strict=True):
            done(len(members))
    return images, labels


def draw_class(
    shape: Callable[[np.ndarray, np.ndarray], np.ndarray], count: int, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """`count` images (B, 3, H, W) uint8 of one shape."""

    def uniform(low: float, high: float, *more: int) -> np.ndarray:  # (B, *more, 1, 1)
        return rng.uniform(low, high, (count, *more, 1, 1)).astype(np.float32)

    height, width = size
    pixel = 2 / min(size)
    x = ((np.arange(width) + 0.5) * pixel - width / min(size)).astype(np.float32)[None, None, :]  # (1, 1, W)
    y = (height / min(size) - (np.arange(height) + 0.5) * pixel).astype(np.float32)[None, :, None]  # (1, H, 1), up

    def paint(distance: np.ndarray, colour: np.ndarray) -> None:  # distance (B, H, W), colour (B, 3, 1, 1)
        cover = np.clip(0.5 - distance / pixel, 0, 1)[:, None]
        images[...] += cover * (colour - images)

    def stroke(length: float, thinnest: float, thickest: float) -> np.ndarray:
        """Distance to a segment through a random place."""
        angle, half = uniform(0, np.pi), uniform(0, length)
        u, v = turned(x - uniform(-0.9, 0.9), y - uniform(-0.9, 0.9), angle)
        return np.hypot(np.maximum(np.abs(u) - half, 0), v) - uniform(thinnest, thickest)

    # Ground and shape are on opposite sides of grey, so the shape can always be seen.
    light = (rng.random((count, 1, 1, 1)) < 0.56).astype(np.float32)
    ground, other = (0.58 * light + uniform(0, 0.42, 3) for _ in range(2))
    along, _ = turned(x, y, uniform(0, 2 * np.pi))
    images = ground + (other - ground) * np.clip(0.5 + 0.5 * along, 0, 1)[:, None]  # (B, 3, H, W)
    for _ in range(STROKES):
        paint(stroke(0.7, 0.02, 0.1), uniform(0, 1, 3))

    scale = uniform(0.6, 0.85)
    reach = 0.5 - 0.4 * scale
    u, v = turned(x - reach * uniform(-1, 1), y - reach * uniform(-1, 1), uniform(-0.25, 0.25))
    paint(scale * shape(u / scale, v / scale), 0.58 * (1 - light) + uniform(0, 0.42, 3))

    hidden = np.where(rng.random((count, 1, 1)) < 0.5, 0, np.float32(9))  # half of the strokes in front are moved away
    paint(stroke(0.7, 0.04, 0.12) + hidden, uniform(0, 1, 3))
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    images += uniform(0, 0.05)[:, None] * noise
    return np.clip(np.rint(255 * images), 0, 255).astype(np.uint8)


def turned(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in a frame rotated by `angle`."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x
