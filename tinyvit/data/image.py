"""One image file to one uint8 RGB array: colour modes, bit depths, EXIF rotation, resize and crop."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from tinyvit.data.base import DataError, pair
from tinyvit.data.image_transforms import centre_crop, covering_size, margin, resize, resize_to_cover, trimmed_size
from tinyvit.files.reading import check_regular
from tinyvit.files.text import one_line

# The formats that are decoded within the process. Pillow would hand others, PostScript for one, to external programs.
FORMATS = tuple(
    ["AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"]
)
MOST_PIXELS = 50_000_000  # of an image: decoded, 200 MB
_decoding = threading.Semaphore(2)  # how many large images are decoded at a time
LARGE = 8_000_000  # pixels

BITS_PER_SAMPLE = 258  # the TIFF tag
ORIENTATION = 0x0112  # the EXIF tag; below, what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image file inside another file: `read` gives its bytes, `name` is what error messages call it."""

    name: str
    read: Callable[[], bytes]


Source = str | os.PathLike[str] | BinaryIO | StoredImage
Size = tuple[int, int]
Span = tuple[float, float]


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """Give the image of a source, not decoded yet: its format, size and mode are known.

    Every image is opened here: only regular files, and only FORMATS.

    Raises:
        OSError, ValueError: no image, or one of more than MOST_PIXELS.
    """
    file: str | os.PathLike[str] | BinaryIO
    if isinstance(source, StoredImage):
        content = source.read()
        if not content:
            raise ValueError("it has no bytes")
        file = io.BytesIO(content)
    else:
        file = source
        if isinstance(source, str | os.PathLike):
            check_regular(source)
    with Image.open(file, formats=formats()) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels, at most {MOST_PIXELS} are read")
        yield image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image that is not decoded yet, as it is seen."""
    width, height = image.size
    return (width, height) if exif_orientation(image) >= 5 else (height, width)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an image: by its ending or, for an unknown ending, by its first bytes."""
    if os.path.splitext(path)[1].lower() in known_endings():
        return True
    try:
        with opened(path):
            return True
    except Exception:  # whatever a decoder says to bytes that are not its own
        return False


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def known_endings() -> frozenset[str]:
    """The endings of FORMATS, in lower case."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats())


def read_image(
    source: Source,
    image_size: int | tuple[int, int],
    *,
    crop_pct: float | None = None,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Decode an image for evaluation: uint8 (3, H, W), with timm's words for how it is cut.

    The image is resized until it covers `image_size / crop_pct` ("center": keeping its aspect ratio; "squash": to
    exactly that) and the centre is cut out. `crop_pct` defaults to 0.875 (256 -> 224) for sizes over 64, else to 1.
    Raises DataError, naming the file, when it cannot be decoded.
    """
    size = pair(image_size)
    image = fit(open_rgb(source), size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
    return to_array(image)


def open_rgb(source: Source) -> Image.Image:
    """Decode `source` into an upright RGB image (of an animation, the first frame).

    Transparency is laid on white; 16-bit, 32-bit and float greys are scaled, not clipped.
    Raises DataError, naming the file, when it cannot be decoded.
    """
    try:
        with opened(source) as image, _turn(image):
            image.load()
            rgb = upright_rgb(image)
    except Exception as error:  # broken files make Pillow's decoders raise nearly anything
        name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
        raise DataError(f"cannot read image {name}: {reason(error)}") from error
    return rgb


def _turn(image: Image.Image) -> contextlib.AbstractContextManager[Any]:
    """A context for decoding: threads decode many images at a time, but only a few large ones among them."""
    return _decoding if image.width * image.height > LARGE else contextlib.nullcontext()


def reason(error: Exception) -> str:
    """The error's message as one short line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not spoil the image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """`to_rgb` of an image, turned as its EXIF orientation says."""
    orientation, rgb = exif_orientation(image), to_rgb(image)
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, what is transparent laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return grey_to_rgb(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def grey_to_rgb(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits in RGB. A value that a PNG declares as transparent becomes white.

    White is 65535 for integers, 1 or 255 for floats. A TIFF file may hold fewer bits than its type: white is then
    2^bits - 1 as it declares, or the least of 255, 4095 and 65535 that no value exceeds.
    """
    values = np.asarray(image)
    whites: tuple[float, ...] = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    if image.format == "TIFF" and image.mode != "F":
        bits = min(image.tag_v2.get(BITS_PER_SAMPLE, (16,)))  # type: ignore[attr-defined]
        whites = (2.0**bits - 1,) if bits < 16 else (255.0, 4095.0, 65535.0)
    grey = to_8_bits(values, whites)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def to_8_bits(grey: np.ndarray, whites: Sequence[float]) -> np.ndarray:
    """Grey values (H, W) of any dtype as uint8.

    White is the first of `whites` that no value exceeds, else the highest value. Negative values and those that are not
    finite are black.
    """
    grey = np.nan_to_num(grey.astype(np.float64), posinf=0, neginf=0)
    highest = grey.max(initial=0)
    white = next((white for white in whites if highest <= white), highest)
    return np.rint(np.maximum(grey, 0) * (255 / white)).astype(np.uint8)


def fit(image: Image.Image, size: Size, *, interpolation: str = "bicubic", **crop: Any) -> Image.Image:
    """Resize and centre-crop an RGB image to `size` (height, width), as read_image describes."""
    larger = size_before_crop(size, **crop)
    resized = (resize if crop.get("crop_mode") == "squash" else resize_to_cover)(image, larger, interpolation)
    return centre_crop(resized, size)


def size_before_crop(size: Size, crop_pct: float | None = None, crop_mode: str = "center") -> Size:
    """The size that an image is resized to (or to cover), before the middle `size` is cut out. Raises DataError."""
    if crop_mode not in ("center", "squash"):
        raise DataError(f"crop mode {crop_mode!r} given, expected 'center' or 'squash'")
    if crop_pct is None:
        crop_pct = usual_crop(size)
    if not 0 < crop_pct <= 1:
        raise DataError(f"crop_pct {crop_pct} given, expected more than 0 and at most 1")
    return int(size[0] / crop_pct), int(size[1] / crop_pct)


def seen_part(stored_size: Size, size: Size, *, interpolation: str = "", **crop: Any) -> tuple[Span, Span]:
    """Where in an image of `stored_size` (height, width) lies what `fit` keeps of it, given the same arguments.

    Returns:
        (top, bottom) and (left, right) in the image's pixels.
    """
    larger, squash = size_before_crop(size, **crop), crop.get("crop_mode") == "squash"
    trimmed = stored_size if squash else trimmed_size(*stored_size)
    resized = larger if squash else covering_size(*trimmed, larger)

    def span(whole: int, trimmed: int, resized: int, kept: int) -> Span:
        start, scale = margin(resized, kept), trimmed / resized
        return margin(whole, trimmed) + scale * start, margin(whole, trimmed) + scale * (start + kept)

    rows, columns = map(span, stored_size, trimmed, resized, size)
    return rows, columns


def usual_crop(size: tuple[int, int]) -> float:
    """The share of a resized image that is kept when nothing else was said: 224 of 256, small images whole."""
    return 0.875 if max(size) > 64 else 1.0


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (3, H, W) of an RGB image."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
