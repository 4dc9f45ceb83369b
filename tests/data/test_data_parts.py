"""The parts of a data set: recognised by their usual names, each measured on request, none passed over in silence."""

import json
import os
import shutil
import stat

import numpy as np
import pytest
from pictures import grow, paint
from PIL import Image
from running import NANO, assert_one_line_error, make_images, tinyvit

from tinyvit.data import DataError, load_data
from tinyvit.data.image import open_rgb
from tinyvit.data.sources.listing import part_of


@pytest.mark.parametrize(
    ("train", "other"),
    [("Training", "Testing"), ("training_set", "test_set"), ("seg_train", "seg_test"), ("train_images", "test-images"),
     ("trainset", "testset"), ("TRAIN", "TEST"), ("train", "Valid"), ("train", "eval"), ("train", "dev"),
     ("training", "validation"), ("train", "holdout"), ("Train Data", "Test Data")],
)  # fmt: skip
def test_usual_names(tmp_path, train, other):
    grow(tmp_path / train, count=5)
    grow(tmp_path / other, count=2)
    data = load_data(tmp_path)
    assert data.class_names == ("cat", "dog") and len(data.train) == 10 and len(data.test) == 4
    assert list(data.parts) == ["train", part_of(other)]


def test_a_class_called_train_is_a_class(tmp_path):
    assert load_data(grow(tmp_path, classes=("bus", "car", "train"))).class_names == ("bus", "car", "train")


def test_what_could_be_either_is_refused(tmp_path):
    grow(tmp_path / "train")
    grow(tmp_path / "extra")
    with pytest.raises(DataError, match=r"images in extra/, which is no part of a data set: move it away, or give"):
        load_data(tmp_path)
    grow(tmp_path / "training")
    with pytest.raises(DataError, match="train images under two names, train and training"):
        load_data(tmp_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run, and a data set with three parts."""
    home = tmp_path_factory.mktemp("parts")
    images = make_images(home / "images", train=8, test=4)
    result = tinyvit("train", "--data", images, *NANO, "--epochs", 1, "--batch-size", 8, "--out", home / "run")
    assert result.returncode == 0, result.stderr
    three = make_images(home / "three", train=6, test=5, seed=1)
    make_images(home / "more", train=1, test=3, seed=2)
    (home / "more" / "test").rename(three / "val")
    return home


def measured(home, data, *options):
    result = tinyvit("eval", home / "run", "--data", data, "--json", *options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_eval_measures_every_image(home):
    found = measured(home, home / "three")
    assert found["images"] == 3 * (6 + 5 + 3) and measured(home, home / "three", "--split", "all") == found
    parts = {name: measured(home, home / "three", "--split", name) for name in ("train", "val", "test")}
    assert {name: part["images"] for name, part in parts.items()} == {"train": 18, "val": 9, "test": 15}
    for name in ("accuracy", "top5", "loss"):
        mean = sum(part[name] * part["images"] for part in parts.values()) / found["images"]
        assert found[name] == pytest.approx(mean)
    assert found["splits"]["val"] == {"images": 9, "accuracy": parts["val"]["accuracy"]}


def test_eval_of_a_folder_without_parts_is_whole(home):
    assert measured(home, home / "three" / "train")["images"] == 18
    message = assert_one_line_error(tinyvit("eval", home / "run", "--data", home / "images", "--split", "val"), 2)
    assert message.endswith("images has no val images, expected --split train, test or all")


# --- what is an image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jp2", "tga", "ico", "dib", "pnm", "apng", "webp", "qoi", "tif", "jfif"])
def test_every_format_that_pillow_decodes(tmp_path, ending):
    kinds = {"jp2": "JPEG2000", "tif": "TIFF", "jfif": "JPEG", "apng": "PNG", "pnm": "PPM"}
    grow(tmp_path)
    try:
        paint(tmp_path / "cat" / f"more.{ending}", size=(16, 16), format=kinds.get(ending, ending.upper()))
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {ending}")
    data = load_data(tmp_path)
    assert len(data.train) + len(data.test) == 7


def test_an_image_without_an_ending_is_one_and_other_files_are_counted(tmp_path):
    grow(tmp_path / "train", count=4)
    grow(tmp_path / "test", count=4)
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "cat" / "0")
    notes = [tmp_path / part / "cat" / "notes.txt" for part in ("train", "test")]
    for file in notes:
        file.write_text("no image")
    data = load_data(tmp_path)
    assert len(data.train) == 8
    assert data.no_images == tuple(map(str, notes))


def test_files_that_are_no_images_are_named_by_every_command(home, tmp_path):
    """Such as an image without an ending that is damaged."""
    images = shutil.copytree(home / "images", tmp_path / "images")
    damaged = images / "test" / "red" / "00"
    damaged.with_suffix(".png").rename(damaged)
    damaged.write_bytes(b"nonsense")
    said = f"passed over 1 file that is no image of a class, the first is {damaged}"
    commands = [
        ["train", "--data", images, *NANO, "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "run"],
        ["eval", home / "run", "--data", images],
        ["predict", home / "run", images],
    ]
    for command in commands:
        assert said in tinyvit(*command).stdout.splitlines()
    for command in commands[1:]:
        assert json.loads(tinyvit(*command, "--json").stdout)["no_images"] == [str(damaged)]


@pytest.mark.skipif(os.name != "posix", reason="needs an executable script")
def test_no_image_starts_a_program(tmp_path, monkeypatch):
    mark, program = tmp_path / "mark", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    images = make_images(tmp_path / "images", train=4, test=2)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    (images / "train" / "red" / "x.png").write_bytes(postscript)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    options = ["--data", images, *NANO, "--epochs", 1, "--skip-corrupt", "--out", tmp_path / "run"]
    result = tinyvit("train", *options)
    assert result.returncode == 0 and "x.png" in result.stdout, result.stderr
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="is a pipe, a socket or a device"):
        open_rgb(tmp_path / "pipe.png")


def test_an_image_of_too_many_pixels_is_refused(tmp_path):
    Image.new("1", (8000, 8000)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match="8000 x 8000 pixels, at most 50000000 are read"):
        open_rgb(tmp_path / "large.png")


# --- how an image is read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_data_set_is_that_of_upright_images(tmp_path, orientation):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            exif = Image.Exif()
            exif[0x0112] = orientation
            paint(tmp_path / split / name / "0.png", size=(32, 48), exif=exif)
    data = load_data(tmp_path)
    assert data.image_size == ((48, 32) if orientation >= 5 else (32, 48))
    stored = open_rgb(tmp_path / "test" / "cat" / "0.png")
    assert np.array_equal(data.test.read(np.array([0]))[0], np.asarray(stored).transpose(2, 0, 1))


def test_sixteen_bits_with_transparency(tmp_path):
    values = np.array([[0, 65535, 32768, 257]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=257)
    assert np.asarray(open_rgb(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 128, 255]


@pytest.mark.parametrize(("highest", "white"), [(255, 255), (4095, 4095), (4000, 4095), (65535, 65535), (5000, 65535)])
def test_tiff_of_fewer_bits_than_its_type(tmp_path, highest, white):
    values = np.array([[0, highest // 2, highest]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = np.rint(values[0] * (255 / white)).astype(int).tolist()
    assert np.asarray(open_rgb(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


def test_an_image_replaced_by_one_of_the_same_size_is_noticed(tmp_path):
    grow(tmp_path)
    path = tmp_path / "cat" / "0.bmp"
    Image.new("RGB", (200, 200)).save(path)
    before = load_data(tmp_path, image_size=8).fingerprint
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 255
    path.write_bytes(changed)
    assert load_data(tmp_path, image_size=8).fingerprint != before
