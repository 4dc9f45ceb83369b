"""One image file: every mode and depth comes out as the RGB that it shows, upright and cut as asked."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyvit.data import DataError, read_image
from tinyvit.data.image import open_rgb
from tinyvit.data.image_transforms import (
    centre_crop,
    random_resized_crop,
    resize,
    resize_to_cover,
)


def rgb_array(height=6, width=8):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image, ending, **options):
    file = io.BytesIO()
    image.save(file, ending, **options)
    file.seek(0)
    return file


def decoded(image, ending="PNG", **options):
    return np.asarray(open_rgb(saved(image, ending, **options)))


# --- modes and depths ---------------------------------------------------------------------------------------


def test_rgb_comes_unchanged():
    pixels = rgb_array()
    assert np.array_equal(decoded(Image.fromarray(pixels)), pixels)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey(mode):
    image = Image.fromarray(rgb_array()).convert(mode)
    assert np.array_equal(decoded(image), np.repeat(np.asarray(image.convert("L"))[:, :, None], 3, axis=2))


def test_palette():
    image = Image.fromarray(rgb_array()).quantize(16)
    assert np.array_equal(decoded(image), np.asarray(image.convert("RGB")))


def test_cmyk():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]], np.uint8)
    image = Image.fromarray(colours).convert("CMYK")
    assert np.array_equal(decoded(image, "TIFF"), colours)
    wide = Image.fromarray(colours.repeat(16, 0).repeat(16, 1)).convert("CMYK")  # as JPEG, stored inverted
    np.testing.assert_allclose(decoded(wide, "JPEG", quality=95)[8, 8::16], colours[0], atol=12)


def transparent(mode):
    """An image whose left half is red or black at full transparency, the right half opaque."""
    rgba = np.zeros((4, 8, 4), np.uint8)
    rgba[:, 4:] = 90, 90, 90, 255
    image = Image.fromarray(rgba)
    if mode == "P":
        return saved(image.quantize(4), "PNG")
    if mode in ("LA", "RGBA"):
        return saved(image.convert(mode), "PNG")
    key = (0, 0, 0) if mode == "RGB" else 0  # a colour that is to be taken as transparent
    return saved(image.convert(mode), "PNG", transparency=key)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparency_is_laid_on_white(mode):
    pixels = np.asarray(open_rgb(transparent(mode)))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 90).all()


def test_half_transparency():
    assert decoded(Image.new("RGBA", (1, 1), (0, 100, 255, 128))).tolist() == [[[127, 177, 255]]]


RAMP = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)


@pytest.mark.parametrize("ending", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(ending):
    pixels = decoded(Image.fromarray(RAMP), ending)
    expected = np.rint(RAMP / 257)
    assert (pixels == expected[:, :, None]).all()


def test_dark_16_bits_stay_dark():
    assert decoded(Image.fromarray((RAMP // 256).astype(np.uint16))).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535, 32896]], np.int32), [0, 255, 128]),
        (np.array([[-5, 1 << 20, 1 << 19]], np.int32), [0, 255, 128]),
        (np.array([[0.0, 1.0, 0.2]], np.float32), [0, 255, 51]),
        (np.array([[0.0, 255.0, 51.0]], np.float32), [0, 255, 51]),
        (np.array([[-1.0, 1000.0, 200.0]], np.float32), [0, 255, 51]),
        (np.array([[np.nan, 1.0, np.inf]], np.float32), [0, 255, 0]),
        (np.zeros((1, 3), np.float32), [0, 0, 0]),
    ],
)
def test_32_bits_and_floats_are_scaled(values, expected):
    assert decoded(Image.fromarray(values), "TIFF")[0, :, 0].tolist() == expected


def png_16_bits_rgb(pixels):
    """Pillow cannot write this kind of PNG."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


def test_16_bits_a_channel():
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 4, 3))
    np.testing.assert_allclose(np.asarray(open_rgb(png_16_bits_rgb(pixels))), pixels / 257, atol=1)


@pytest.mark.parametrize(("ending", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_animation_gives_its_first_frame(ending, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    pixels = decoded(frames[0], ending, save_all=True, append_images=frames[1:], **options)
    assert (pixels == (255, 0, 0)).all()


# --- orientation --------------------------------------------------------------------------------------------

# How a camera stores an upright image under each EXIF orientation (EXIF 2.32, tag 274).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_orientation_is_applied(orientation, mode):
    upright = rgb_array()
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    if mode == "I;16":
        upright = upright[:, :, :1].repeat(3, axis=2)
        stored = stored[:, :, 0].astype(np.uint16) * 257
    assert np.array_equal(decoded(Image.fromarray(stored), exif=exif), upright)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03", b"\xff" * 40])
def test_broken_exif_does_not_spoil_an_image(exif):
    pixels = np.full((8, 8, 3), 77, np.uint8)
    assert np.array_equal(decoded(Image.fromarray(pixels), "JPEG", exif=exif), pixels)


def test_unknown_orientation_is_ignored():
    exif = Image.Exif()
    exif[274] = 9
    assert np.array_equal(decoded(Image.fromarray(rgb_array()), exif=exif), rgb_array())


# --- files that cannot be read ------------------------------------------------------------------------------


def broken_files(tmp_path):
    whole = saved(Image.fromarray(rgb_array(64, 64)), "PNG").getvalue()
    jpeg = saved(Image.fromarray(rgb_array(64, 64)), "JPEG").getvalue()
    yield "empty.png", b"", "not an image that Pillow knows"
    yield "text.jpg", b"hello", "not an image that Pillow knows"
    yield "half.png", whole[: len(whole) // 2], "truncated"
    yield "half.jpg", jpeg[: len(jpeg) // 2], "truncated"
    yield "flipped.png", whole[:60] + bytes(byte ^ 0xFF for byte in whole[60:90]) + whole[90:], ""


@pytest.mark.parametrize("number", range(5))
def test_broken_file_is_named(tmp_path, number):
    name, content, reason = list(broken_files(tmp_path))[number]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / name, 32)
    message = str(error.value)
    assert message.startswith(f"cannot read image {tmp_path / name}: ") and reason in message and "\n" not in message


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read image .*gone\.png: No such file or directory"):
        read_image(tmp_path / "gone.png", 32)


@pytest.mark.parametrize("pixels", [1500, 2500])  # Pillow warns above its limit, and raises above twice that
def test_a_bomb_is_unreadable(monkeypatch, tmp_path, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (pixels, 1)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"bomb\.png: Image size \(\d+ pixels\) exceeds limit"):
        read_image(tmp_path / "bomb.png", 32)


@given(st.data())
def test_damage_is_an_error_or_an_image(data):
    """Whatever a decoder raises on a damaged file, it comes out as a DataError in one line."""
    ending = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    content = bytearray(saved(Image.fromarray(rgb_array(24, 24)), ending).getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content) - 1, 200)))] = data.draw(st.integers(0, 255))
    try:
        assert open_rgb(io.BytesIO(bytes(content))).mode == "RGB"
    except DataError as error:
        assert "\n" not in str(error)


# --- size ---------------------------------------------------------------------------------------------------


def test_read_image_shape_and_layout(tmp_path):
    pixels = rgb_array(40, 40)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), io.BytesIO((tmp_path / "a.png").read_bytes())):
        array = read_image(source, 40)
        assert array.dtype == np.uint8 and array.flags.c_contiguous
        assert np.array_equal(array, pixels.transpose(2, 0, 1))
    assert read_image(tmp_path / "a.png", (20, 30)).shape == (3, 20, 30)


def test_default_crop_is_that_of_evaluation(tmp_path):
    """224 of 256, as in most evaluations; small images are kept whole."""
    image = Image.fromarray(rgb_array(256, 512))
    image.save(tmp_path / "a.png")
    centre = np.asarray(image.crop((144, 16, 368, 240))).transpose(2, 0, 1)
    assert np.array_equal(read_image(tmp_path / "a.png", 224), centre)
    whole = np.asarray(image.crop((128, 0, 384, 256)).resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_allclose(read_image(tmp_path / "a.png", 64), whole, atol=30)
    assert read_image(tmp_path / "a.png", 64).shape == (3, 64, 64)


def test_squash_ignores_the_aspect_ratio(tmp_path):
    image = Image.fromarray(rgb_array(20, 60))
    image.save(tmp_path / "a.png")
    array = read_image(tmp_path / "a.png", 30, crop_pct=1.0, crop_mode="squash", interpolation="bilinear")
    expected = image.resize((30, 30), Image.Resampling.BILINEAR)
    assert np.array_equal(array, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"interpolation": "cubic"},
            "interpolation 'cubic' given, expected one of nearest, bilinear, bicubic, lanczos",
        ),
        ({"crop_mode": "border"}, "crop mode 'border' given, expected 'center' or 'squash'"),
        ({"crop_pct": 0.0}, "crop_pct 0.0 given, expected more than 0 and at most 1"),
        ({"image_size": 0}, "image size 0x0 given, expected at least 1x1"),
    ],
)
def test_wrong_options(options, message):
    options = {"image_size": 32, "crop_pct": 0.9} | options
    with pytest.raises(DataError, match=message):
        read_image(saved(Image.fromarray(rgb_array()), "PNG"), **options)


sides = st.integers(1, 40)


@given(sides, sides, sides, sides)
def test_cover_is_the_smallest_that_covers(height, width, want_height, want_width):
    covered = resize_to_cover(Image.new("RGB", (width, height)), (want_height, want_width))
    assert covered.height >= want_height and covered.width >= want_width
    assert covered.height == want_height or covered.width == want_width
    ratio = np.clip(height / width, 1 / 16, 16)
    assert abs(covered.height - ratio * covered.width) <= max(1, ratio)


def test_a_strip_is_not_blown_up():
    assert resize_to_cover(Image.new("RGB", (100_000, 1)), (224, 224)).size == (16 * 224, 224)


@given(sides, sides, st.data())
def test_centre_crop(height, width, data):
    size = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    pixels = np.arange(height * width, dtype=np.int32).reshape(height, width)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    crop = np.asarray(centre_crop(Image.fromarray(pixels), size))
    assert np.array_equal(crop, pixels[top : top + size[0], left : left + size[1]])


def test_centre_crop_needs_a_larger_image():
    with pytest.raises(DataError, match="cannot crop 9x4 from an image of 8x6"):
        centre_crop(Image.new("RGB", (6, 8)), (9, 4))


def test_resize_is_exact():
    assert resize(Image.new("RGB", (7, 9)), (5, 3)).size == (3, 5)


# --- random images ----------------------------------------------------------------------------------------


def coordinates(size=100):
    """An image whose red is its row and whose green its column."""
    rows, columns = np.mgrid[:size, :size].astype(np.uint8)
    return Image.fromarray(np.stack([rows, columns, rows], axis=2))


@given(st.integers(0, 2**32 - 1))
def test_random_resized_crop_is_a_part_in_its_bounds(seed):
    crop = random_resized_crop(
        coordinates(),
        np.random.default_rng(seed),
        (200, 200),
        scale=(0.2, 0.5),
        ratio=(0.5, 2),
        interpolation="nearest",
    )
    pixels = np.asarray(crop).astype(int)
    height, width = (np.ptp(pixels[:, :, channel]) + 1 for channel in (0, 1))
    assert 0.17 < height * width / 100**2 < 0.55 and 0.45 < width / height < 2.2
    assert (np.diff(pixels[:, :, 0], axis=0) >= 0).all() and (pixels[:, :, 0] == pixels[:, :1, 0]).all()


def test_random_resized_crop_reaches_every_corner():
    rng = np.random.default_rng(0)
    crops = [np.asarray(random_resized_crop(coordinates(), rng, (8, 8), interpolation="nearest")) for _ in range(300)]
    tops, bottoms = [crop[0, 0, 0] for crop in crops], [crop[-1, -1, 0] for crop in crops]
    assert min(tops) < 8 and max(tops) > 60 and min(bottoms) < 40 and max(bottoms) > 91
    assert len({crop.tobytes() for crop in crops}) == 300


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 1)])
def test_random_resized_crop_of_odd_images(size):
    assert random_resized_crop(Image.new("RGB", size), np.random.default_rng(0), (8, 6)).size == (6, 8)


def test_random_images_depend_on_the_generator_alone():
    first, second, other = (
        random_resized_crop(coordinates(), np.random.default_rng(seed), (9, 9)) for seed in (1, 1, 2)
    )
    assert first.tobytes() == second.tobytes() != other.tobytes()
