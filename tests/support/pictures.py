"""Shared by the tests of data sets: images of one colour, what is read of them, and messages of errors."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from tinyvit.data import DataError, load_data


def picture(colour=(0, 0, 0), kind="PNG", size=(8, 8)):
    """The bytes of an image file; `size` is (height, width), as it is for all here."""
    file = io.BytesIO()
    Image.new("RGB", size[::-1], colour).save(file, kind)
    return file.getvalue()


def paint(path, colour=(0, 0, 0), size=(8, 8), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], colour).save(path, **how)


def grow(root, classes=("cat", "dog"), count=3, size=(8, 8)):
    """`count` images a class; image i of class k has the colour (k, i, 100)."""
    for k, name in enumerate(classes):
        for i in range(count):
            paint(root / name / f"{i}.png", (k, i, 100), size)
    return root


def colours(split):
    """Red and green of each image."""
    return split.read(np.arange(len(split)))[:, :2, 0, 0].tolist()


def assert_error(message, source, root, **options):
    """Loading the data set fails with a message that matches, ROOT standing for the path `root`."""
    with pytest.raises(DataError) as error:
        load_data(source, **options)
    assert re.fullmatch(message.replace("ROOT", re.escape(str(root))), str(error.value)), error.value
