"""AutoAugment and RandAugment on whole batches of uint8 images (B, C, H, W), of any array-API library.

The operations are Pillow's, as the papers' authors used it: integers, nearest pixels, and grey where nothing was.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyvit import kernels
from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array
from tinyvit.data.augment import count, gather, per_image
from tinyvit.kernels import reference

GREY = 128
# Magnitude 1 of each operation: AutoAugment (Cubuk et al. 2018, arXiv:1805.09501), table 6.
SHEAR, TRANSLATE, ROTATE, ENHANCE, POSTERIZE = 0.3, 150 / 331, 30.0, 0.9, 4


def warp(images: Array, matrices: np.ndarray) -> Array:
    """Each pixel from where its image's matrix says, the nearest one; grey from outside of the image.

    `matrices` (B, 2, 3) give the source of a place (x, y, 1), as in Pillow: pixels have their centres at halves.
    """
    xp = arrays.namespace(images)
    height, width = images.shape[2:]
    ys, xs = (xp.astype(count(n, images), xp.float64) + 0.5 for n in (height, width))
    m = arrays.convert(matrices, images)

    def source(row: int, length: int) -> tuple[Array, Array]:
        at = m[:, row, 0][:, None, None] * xs + m[:, row, 1][:, None, None] * ys[:, None] + m[:, row, 2][:, None, None]
        at = xp.astype(xp.floor(at), xp.int64)  # (B, H, W)
        return arrays.clip(at, 0, length - 1), (at >= 0) & (at < length)

    (x, in_width), (y, in_height) = source(0, width), source(1, height)
    moved = gather(images, y, x)
    return xp.where((in_width & in_height)[:, None, :, :], moved, xp.full_like(moved, GREY))


def _matrices(images: Array, **entries: np.ndarray) -> np.ndarray:
    """(B, 2, 3): the identity but for `xx`, `xy`, `x` of the first row and `yx`, `yy`, `y` of the second."""
    matrices = np.tile(np.eye(2, 3), (images.shape[0], 1, 1))
    for name, values in entries.items():
        matrices[:, "xy".index(name[0]), "xy".index(name[1]) if name[1:] else 2] = values
    return matrices


def rotate(images: Array, degrees: np.ndarray) -> Array:
    """Turn each image of (B, C, H, W) counterclockwise about its centre."""
    a, cx, cy = np.radians(degrees), images.shape[3] / 2, images.shape[2] / 2
    cos, sin = np.cos(a), np.sin(a)
    x, y = cx - cos * cx + sin * cy, cy - sin * cx - cos * cy
    return warp(images, _matrices(images, xx=cos, xy=-sin, x=x, yx=sin, yy=cos, y=y))


def enhancement(start: Callable[[Array], Array]) -> Callable[[Array, np.ndarray], Array]:
    """An operation that goes from what `start` makes of images to them and beyond, cut off at 0 and 255."""

    def enhance(images: Array, m: np.ndarray) -> Array:
        xp = arrays.namespace(images)
        first = xp.astype(start(images), xp.float32)
        factor = per_image((1 + ENHANCE * m).astype(np.float32), images)
        return xp.astype(arrays.clip(first + factor * (xp.astype(images, xp.float32) - first), 0, 255), xp.uint8)

    return enhance


def grey(images: Array) -> Array:
    """(B, 1, H, W) int64, the luma of RGB images; those of other channels have none and stay (B, C, H, W)."""
    xp = arrays.namespace(images)
    values = xp.astype(images, xp.int64)
    if images.shape[1] != 3:
        return values
    r, g, b = (values[:, i : i + 1, :, :] for i in range(3))
    return (19595 * r + 38470 * g + 7471 * b + 32768) // 65536


def mean_grey(images: Array) -> Array:
    """(B, 1, 1, 1)."""
    xp = arrays.namespace(images)
    return xp.floor(xp.mean(xp.astype(grey(images), xp.float64), axis=(1, 2, 3), keepdims=True) + 0.5)


def smooth(images: Array) -> Array:
    """Weighted with 1, and 5 in the middle. Pixels at the edges stay."""
    xp = arrays.namespace(images)
    values, (height, width) = xp.astype(images, xp.int64), images.shape[2:]
    shifts = [values[:, :, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    inner = xp.astype((2 * (sum(shifts[1:], start=shifts[0]) + 4 * shifts[4]) + 13) // 26, xp.uint8)
    rows = xp.concat([images[:, :, 1:-1, :1], inner, images[:, :, 1:-1, -1:]], axis=3)
    return xp.concat([images[:, :, :1, :], rows, images[:, :, -1:, :]], axis=2)


def solarize(images: Array, threshold: np.ndarray) -> Array:
    """255 - x from `threshold` (B,) on."""
    xp = arrays.namespace(images)
    return xp.where(xp.astype(images, xp.float64) < per_image(threshold, images), images, 255 - images)


def posterize(images: Array, bits: np.ndarray) -> Array:
    """The highest `bits` (B,) of each value."""
    return images & per_image((256 - 2 ** (8 - bits)).astype(np.uint8), images)


def autocontrast(images: Array) -> Array:
    """Each channel stretched from 0 to 255."""
    xp = arrays.namespace(images)
    values = xp.astype(images, xp.float64)
    low, high = (f(values, axis=(2, 3), keepdims=True) for f in (xp.min, xp.max))
    scale = 255.0 / xp.where(high > low, high - low, xp.ones_like(high))
    stretched = xp.astype(arrays.clip(values * scale + (-low * scale), 0, 255), xp.uint8)
    return xp.where(high > low, stretched, images)


def equalize(images: Array) -> Array:
    """Each channel with values that are spread evenly."""
    xp = arrays.namespace(images)
    batch, channels, height, width = images.shape
    planes = batch * channels
    values = xp.reshape(xp.astype(images, xp.int64), (planes, -1))
    places = xp.reshape(values + 256 * count(planes, images)[:, None], (-1,))
    ones = xp.ones(places.shape, dtype=xp.float64, device=arrays.device(images))
    counts = kernels.best(reference.sum_at, xp)(xp, ones, places, 256 * planes)
    counts = xp.reshape(xp.astype(counts, xp.int64), (planes, 256))
    largest = xp.max(values, axis=1, keepdims=True)
    step = (height * width - xp.sum(xp.astype(values == largest, xp.int64), axis=1, keepdims=True)) // 255
    before = xp.cumulative_sum(counts, axis=1) - counts
    safe = xp.where(step > 0, step, xp.ones_like(step))
    table = xp.where(step > 0, arrays.clip((step // 2 + before) // safe, 0, 255), count(256, images)[None, :])
    return xp.reshape(xp.astype(xp.take(xp.reshape(table, (-1,)), places, axis=0), xp.uint8), images.shape)


def _translation(images: Array, axis: int, share: np.ndarray) -> np.ndarray:
    return np.trunc(share * TRANSLATE * images.shape[axis])


# What an operation does at the magnitudes m (B,) in -1 ... 1, or 0 ... 1 for those that have no direction.
OPERATIONS: dict[str, Callable[[Array, np.ndarray], Array]] = {
    "identity": lambda x, m: x,
    "shear_x": lambda x, m: warp(x, _matrices(x, xy=-SHEAR * m)),
    "shear_y": lambda x, m: warp(x, _matrices(x, yx=-SHEAR * m)),
    "translate_x": lambda x, m: warp(x, _matrices(x, x=-_translation(x, 3, m))),
    "translate_y": lambda x, m: warp(x, _matrices(x, y=-_translation(x, 2, m))),
    "rotate": lambda x, m: rotate(x, ROTATE * m),
    "brightness": enhancement(lambda x: arrays.namespace(x).zeros_like(x)),
    "color": enhancement(grey),
    "contrast": enhancement(mean_grey),
    "sharpness": enhancement(smooth),
    "posterize": lambda x, m: posterize(x, 8 - np.round(np.abs(m) * POSTERIZE)),
    "solarize": lambda x, m: solarize(x, 255 * (1 - np.abs(m))),
    "autocontrast": lambda x, m: autocontrast(x),
    "equalize": lambda x, m: equalize(x),
    "invert": lambda x, m: 255 - x,
}
NAMES = list(OPERATIONS)
LEVELS = 30  # of RandAugment's magnitude
# AutoAugment's policy for CIFAR-10 (table 7): probability and level, of 9, of two operations.
CIFAR10 = [
    ("invert .1 7", "contrast .2 6"), ("rotate .7 2", "translate_x .3 9"), ("sharpness .8 1", "sharpness .9 3"),
    ("shear_y .5 8", "translate_y .7 9"), ("autocontrast .5 8", "equalize .9 2"), ("shear_y .2 7", "posterize .3 7"),
    ("color .4 3", "brightness .6 7"), ("sharpness .3 9", "brightness .7 9"), ("equalize .6 5", "equalize .5 1"),
    ("contrast .6 7", "sharpness .6 5"), ("color .7 7", "translate_x .5 8"), ("equalize .3 7", "autocontrast .4 8"),
    ("translate_y .4 3", "sharpness .2 6"), ("brightness .9 6", "color .2 8"), ("solarize .5 2", "invert 0 3"),
    ("equalize .2 0", "autocontrast .6 0"), ("equalize .2 8", "equalize .6 4"), ("color .9 9", "equalize .6 6"),
    ("autocontrast .8 4", "solarize .2 8"), ("brightness .1 3", "color .7 0"), ("solarize .4 5", "autocontrast .9 3"),
    ("translate_y .9 9", "translate_y .7 9"), ("autocontrast .9 2", "solarize .8 3"), ("equalize .8 8", "invert .1 3"),
    ("translate_y .7 9", "autocontrast .9 1"),
]  # fmt: skip


def apply(images: Array, chosen: np.ndarray, magnitudes: np.ndarray) -> Array:
    """To each image the operation of its number in `NAMES`, (B,), at its magnitude."""
    xp, order = arrays.namespace(images), np.argsort(chosen, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(chosen[order])) + 1)
    parts = [
        OPERATIONS[NAMES[chosen[group[0]]]](xp.take(images, arrays.convert(group, images), axis=0), magnitudes[group])
        for group in groups
    ]
    return xp.take(xp.concat(parts, axis=0), arrays.convert(np.argsort(order), images), axis=0)


def _signs(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, 2, size) * 2 - 1


def autoaugment(images: Array, rng: np.random.Generator) -> Array:
    """AutoAugment's policy for CIFAR-10: of 25 pairs of operations one for each image (Cubuk et al. 2018)."""
    policies = rng.integers(len(CIFAR10), size=images.shape[0])
    for turn in range(2):
        names, chances, levels = zip(*(pair[turn].split() for pair in CIFAR10), strict=True)
        chance, level = (np.array(values, float)[policies] for values in (chances, levels))
        number = np.array([NAMES.index(name) for name in names])[policies]
        number = np.where(rng.random(len(number)) < chance, number, NAMES.index("identity"))
        images = apply(images, number, level / 9 * _signs(rng, len(number)))
    return images


def randaugment(images: Array, count: int, level: float, rng: np.random.Generator) -> Array:
    """`count` random operations, of all but `invert`, at `level` of 30 (Cubuk et al. 2019, arXiv:1909.13719)."""
    for _ in range(count):
        number = rng.integers(len(NAMES) - 1, size=images.shape[0])
        images = apply(images, number, level / LEVELS * _signs(rng, len(number)))
    return images


def parse(text: str) -> Callable[[Array, np.random.Generator], Array] | None:
    """What "none", "autoaugment" or "randaugment-N-M" (N operations at level M) name. Raises ValueError."""
    if text in ("none", "autoaugment"):
        return None if text == "none" else autoaugment
    kind, _, rest = text.partition("-")
    n, _, m = rest.partition("-")
    if kind != "randaugment" or not (n.isdecimal() and m.isdecimal()) or not (1 <= int(n) <= 14 and int(m) <= LEVELS):
        raise ValueError(f"expected none, autoaugment or randaugment-N-M with M up to {LEVELS}, got {text!r}")
    return lambda images, rng: randaugment(images, int(n), int(m), rng)
