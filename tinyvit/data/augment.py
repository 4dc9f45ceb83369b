"""Transforms of a whole batch of images: arrays in, arrays out, of any array-API library.

Random decisions are drawn on the host from an explicit NumPy generator, a few numbers per image; the pixels move by
integer gathers and arithmetic on whole batches, wherever the batch lives. So every library gives the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyvit.backend import arrays
from tinyvit.backend.arrays import Array


def per_image(values: np.ndarray, images: Array) -> Array:
    """(B,) as (B, 1, 1, 1)."""
    return arrays.convert(values[:, None, None, None], images)


def count(length: int, images: Array) -> Array:
    """0, 1, … beside `images`."""
    return arrays.namespace(images).arange(length, device=arrays.device(images))


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """uint8 (B, C, H, W) in 0..255 -> float32 (pixel / 255 - mean) / std; `mean`, `std` per channel in 0..1."""
    xp = arrays.namespace(images)
    scale = 1 / (255 * np.asarray(std, dtype=np.float64))
    shift = -np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64)
    scale, shift = (arrays.convert(v.astype(np.float32)[:, None, None], images) for v in (scale, shift))
    return xp.astype(images, xp.float32) * scale + shift


def mirror(images: Array, chosen: np.ndarray) -> Array:
    """Mirror the images of (B, C, H, W) where `chosen` (B,) is true left to right."""
    xp = arrays.namespace(images)
    return xp.where(per_image(chosen, images), xp.flip(images, axis=3), images)


def flip(images: Array, rng: np.random.Generator) -> Array:
    """Mirror each image of (B, C, H, W) left to right with probability one half."""
    return mirror(images, rng.random(images.shape[0]) < 0.5)


def gather(images: Array, rows: Array, columns: Array) -> Array:
    """The pixels of (B, C, H, W) at `rows` and `columns`, whole numbers that broadcast to (B, H, W)."""
    xp = arrays.namespace(images)
    batch, channels, height, width = images.shape
    planes = xp.reshape(count(batch * channels, images), (batch, channels, 1, 1)) * (height * width)
    source = planes + (rows * width + columns)[:, None, :, :]  # (B, C, H, W) into the flat batch
    return xp.reshape(xp.take(xp.reshape(images, (-1,)), xp.reshape(source, (-1,)), axis=0), images.shape)


def pad_and_crop(images: Array, padding: int, rng: np.random.Generator) -> Array:
    """Cut each image of (B, C, H, W) at a random place out of itself padded by reflection with `padding` pixels."""
    if padding >= min(images.shape[2:]):
        raise ValueError(f"padding {padding} given, expected less than the image's {min(images.shape[2:])} pixels")
    xp = arrays.namespace(images)

    def places(length: int) -> Array:  # source of each row or column: shifted, and reflected at the edges
        shifts = rng.integers(-padding, padding + 1, size=(images.shape[0], 1))
        i = xp.abs(count(length, images) + arrays.convert(shifts, images))
        return length - 1 - xp.abs(length - 1 - i)  # (B, length)

    rows, columns = map(places, images.shape[2:])
    return gather(images, rows[:, :, None], columns[:, None, :])


def _boxes(images: Array, *spans: tuple[np.ndarray, np.ndarray]) -> Array:
    """Masks (B, 1, H, W) beside `images`, true from the first up to the second (B,) row, and so for columns."""
    rows, columns = (
        (at >= arrays.convert(start[:, None], images)) & (at < arrays.convert(stop[:, None], images))
        for at, (start, stop) in zip((count(n, images) for n in images.shape[2:]), spans, strict=True)
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None, :, :]


def erase(images: Array, probability: float, rng: np.random.Generator) -> Array:
    """Set a rectangle of each image of (B, C, H, W) to zero with this probability.

    Zhong et al. 2017 (arXiv:1708.04896): it covers a share of 0.02 to 0.4, its sides have a ratio of 0.3 to 1 / 0.3,
    and it lies inside. Of ten that are drawn it is the first that fits; the paper draws on until one does. Zero is the
    mean of normalised images.
    """
    xp = arrays.namespace(images)
    batch, _, height, width = images.shape
    area = height * width * rng.uniform(0.02, 0.4, (batch, 10))
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3), (batch, 10)))
    heights, widths = (np.round(np.sqrt(x)).astype(int) for x in (area * ratio, area / ratio))
    fits = (heights < height) & (widths < width)
    first = np.arange(batch), np.argmax(fits, axis=1)
    chosen = (rng.random(batch) < probability) & fits[first]
    spans = []
    for lengths, total in ((heights[first], height), (widths[first], width)):
        start = np.floor(rng.random(batch) * (total - lengths + 1)).astype(int)
        spans.append((start, np.where(chosen, start + lengths, 0)))
    return xp.where(_boxes(images, *spans), xp.zeros_like(images), images)


def turn_and_zoom(images: Array, degrees: float, zoom: float, rng: np.random.Generator) -> Array:
    """Turn each image of (B, C, H, W) floats about its centre by up to `degrees`, and stretch it by up to 1 +- `zoom`.

    Height and width are stretched by factors of their own, as Keras's RandomRotation and RandomZoom do it one after the
    other. Pixels are bilinear in the source's, which is reflected at its edges.
    """
    xp = arrays.namespace(images)
    batch, _, height, width = images.shape
    angle = np.radians(rng.uniform(-degrees, degrees, batch))
    sy, sx = 1 + rng.uniform(-zoom, zoom, (batch, 2)).T
    cos, sin = np.cos(angle), np.sin(angle)
    m = arrays.convert(np.stack([cos * sy, sin * sx, -sin * sy, cos * sx]).astype(np.float32)[:, :, None, None], images)
    y, x = (xp.astype(count(n, images), xp.float32) - (n - 1) / 2 for n in (height, width))
    y = y[:, None]

    def two(at: Array, n: int) -> list[tuple[Array, Array]]:  # the pixels on both sides of a place, and their shares
        low = xp.floor(at)
        sides = [(low, 1 - (at - low)), (low + 1, at - low)]
        places = [xp.astype(side, xp.int64) % (2 * n) for side, _ in sides]
        return [(xp.where(i < n, i, 2 * n - 1 - i), share) for i, (_, share) in zip(places, sides, strict=True)]

    result = xp.zeros_like(images)
    for row, up in two(m[0, ...] * y + m[1, ...] * x + (height - 1) / 2, height):
        for column, across in two(m[2, ...] * y + m[3, ...] * x + (width - 1) / 2, width):
            result = result + (up * across)[:, None, :, :] * gather(images, row, column)
    return result


def one_hot(labels: Array, num_classes: int) -> Array:
    """Integer labels (B,) -> probabilities (B, num_classes) float32."""
    xp = arrays.namespace(labels)
    return xp.astype(labels[:, None] == xp.arange(num_classes, device=arrays.device(labels)), xp.float32)


def mixup(images: Array, targets: Array, alpha: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Blend each image and its target with another's, in shares drawn from Beta(alpha, alpha) (Zhang et al. 2017).

    `images` (B, C, H, W) float, `targets` (B, num_classes) probabilities. The other is, as in timm, that of the batch
    turned round: the last one for the first.
    """
    shares = rng.beta(alpha, alpha, size=images.shape[0]).astype(np.float32)
    return _blend(images, shares[:, None, None, None]), _blend(targets, shares[:, None])


def cutmix(images: Array, targets: Array, alpha: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Paste a box of another image into each; targets mix by area (Yun et al. 2019).

    `images` (B, C, H, W), `targets` (B, num_classes) probabilities. The box covers a share 1 - Beta(alpha, alpha). The
    other image is as in `mixup`.
    """
    batch, _, height, width = images.shape
    side = np.sqrt(1 - rng.beta(alpha, alpha, size=batch))
    spans, area = [], 1
    for total in (height, width):
        lengths = (total * side).astype(int)
        start = rng.integers(total, size=batch) - lengths // 2  # around a random pixel, cut off at the edges
        spans.append((start, start + lengths))
        area = area * (np.minimum(start + lengths, total) - np.maximum(start, 0))
    shares = 1 - np.asarray(area, np.float32) / (height * width)
    xp = arrays.namespace(images)
    mixed = xp.where(_boxes(images, *spans), xp.flip(images, axis=0), images)
    return mixed, _blend(targets, shares[:, None])


def _blend(values: Array, shares: np.ndarray) -> Array:
    """`shares` of each of `values`, the rest of the one at its place in the batch turned round."""
    xp = arrays.namespace(values)
    return values * arrays.convert(shares, values) + xp.flip(values, axis=0) * arrays.convert(1 - shares, values)


@dataclass(frozen=True)
class Augment:
    """What happens to a batch between the disk and the model; with the defaults, only normalisation.

    `flip`: mirror half of the images. `padding`: pad-and-crop, in pixels. `policy`: operations on the pixels, as
    `policies.parse` gives them. `turn`, `zoom`: see `turn_and_zoom`. `erasing`: probability of `erase`.
    `mixup`, `cutmix`: alpha, 0 for off; with both on, each batch takes one of them, evenly. They need `num_classes`
    and turn labels into probabilities.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    padding: int = 0
    policy: Callable[[Array, np.random.Generator], Array] | None = None
    turn: float = 0.0
    zoom: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    num_classes: int = 0

    def __post_init__(self) -> None:
        if self.mixes and not self.num_classes:
            raise ValueError("mixup and cutmix need num_classes, to turn labels into probabilities")

    @property
    def mixes(self) -> bool:
        """Whether an image is combined with that at its place in the batch turned round."""
        return bool(self.mixup or self.cutmix)

    def __call__(self, images: Array, labels: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """uint8 (B, C, H, W) and int64 (B,) -> float32 (B, C, H, W) and the labels, (B, num_classes) if mixed."""
        if self.flip:
            images = flip(images, rng)
        if self.padding:
            images = pad_and_crop(images, self.padding, rng)
        if self.policy is not None:
            images = self.policy(images, rng)
        images = normalise(images, self.mean, self.std)
        if self.turn or self.zoom:
            images = turn_and_zoom(images, self.turn, self.zoom, rng)
        if self.erasing:
            images = erase(images, self.erasing, rng)
        if not self.mixes:
            return images, labels
        targets = one_hot(labels, self.num_classes)
        if self.mixup and (not self.cutmix or rng.random() < 0.5):
            return mixup(images, targets, self.mixup, rng)
        return cutmix(images, targets, self.cutmix, rng)
