"""AutoAugment, RandAugment, erasing, turning and zooming, held against Pillow, the papers and torch."""

import re

import numpy as np
import pytest
import torch
from drawing import BACKENDS, LIBRARIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from tinyvit.backend import arrays
from tinyvit.data import Augment, Loader, policies
from tinyvit.data.augment import erase, turn_and_zoom
from tinyvit.data.splits import ArraySplit

AFFINE, GREY = Image.Transform.AFFINE, (128,) * 3
PILLOW = {
    "identity": lambda image, m: image,
    "shear_x": lambda image, m: image.transform(image.size, AFFINE, (1, -0.3 * m, 0, 0, 1, 0), fillcolor=GREY),
    "shear_y": lambda image, m: image.transform(image.size, AFFINE, (1, 0, 0, -0.3 * m, 1, 0), fillcolor=GREY),
    "translate_x": lambda image, m: image.transform(
        image.size, AFFINE, (1, 0, -int(m * image.width * 150 / 331), 0, 1, 0), fillcolor=GREY
    ),
    "translate_y": lambda image, m: image.transform(
        image.size, AFFINE, (1, 0, 0, 0, 1, -int(m * image.height * 150 / 331)), fillcolor=GREY
    ),
    "rotate": lambda image, m: image.rotate(30 * m, fillcolor=GREY),
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m),
    "color": lambda image, m: ImageEnhance.Color(image).enhance(1 + 0.9 * m),
    "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m),
    "posterize": lambda image, m: ImageOps.posterize(image, int(8 - round(abs(m) * 4))),
    "solarize": lambda image, m: ImageOps.solarize(image, 255 * (1 - abs(m))),
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "invert": lambda image, m: ImageOps.invert(image),
}


def pictures(shape, seed=0):
    """Smooth ones and noise, of few and of many values."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, shape)
    images[::3] = np.sort(images[::3], axis=3)
    images[1::3] = images[1::3] // 4 + 60
    images[-1] = 77
    return images.astype(np.uint8)


@pytest.mark.parametrize("name", policies.NAMES)
@settings(max_examples=15)
@given(size=st.tuples(st.integers(3, 40), st.integers(3, 40)), seed=st.integers(0, 2**32 - 1))
def test_operations_are_pillow_s(name, size, seed):
    images = pictures((6, 3, *size), seed)
    m = np.random.default_rng(seed).uniform(-1, 1, 6)
    expected = [PILLOW[name](Image.fromarray(x.transpose(1, 2, 0)), a) for x, a in zip(images, m, strict=True)]
    expected = np.stack([np.asarray(x).transpose(2, 0, 1) for x in expected])
    got = policies.OPERATIONS[name](images, m)
    assert got.dtype == np.uint8
    if name == "rotate":  # Pillow counts in 2^-16 of a pixel
        assert (got != expected).any(axis=1).mean() < 0.01
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "numpy"])
@pytest.mark.parametrize("options", ["autoaugment", "randaugment-2-9", "erasing", "turn"])
def test_the_same_in_another_array_library(backend, options):
    settings_ = {"erasing": {"erasing": 0.7}, "turn": {"turn": 20.0, "zoom": 0.3}}
    augment = Augment((0.5,) * 3, (0.2,) * 3, **settings_.get(options) or {"policy": policies.parse(options)})
    images, labels = pictures((32, 3, 12, 9)), np.zeros(32, np.int64)
    expected, _ = augment(images, labels, np.random.default_rng(3))
    got, _ = augment(LIBRARIES[backend].asarray(images), labels, np.random.default_rng(3))
    assert arrays.namespace(got) is LIBRARIES[backend]
    apart = np.abs(arrays.to_numpy(got) - expected)  # by one of 255 where a library fuses operations
    assert apart.max() < 1.1 / 255 / 0.2 and (apart > 1e-4).mean() < 0.005
    assert not np.array_equal(expected, Augment((0.5,) * 3, (0.2,) * 3)(images, labels, np.random.default_rng(3))[0])


def test_autoaugment_has_the_paper_s_operations_as_often_as_it_says(monkeypatch):
    """The first pair inverts with probability 0.1, the second one turns with 0.7 to 6.7 degrees in each direction."""
    seen = []
    monkeypatch.setattr(policies, "apply", lambda images, number, m: seen.append((number, m)) or images)
    policies.autoaugment(np.zeros((100_000, 1, 1, 1), np.uint8), np.random.default_rng(0))
    number, m = seen[0]
    assert len(policies.CIFAR10) == 25 and len(seen) == 2
    assert (number == policies.NAMES.index("invert")).mean() == pytest.approx(0.1 / 25, rel=0.1)
    turned = number == policies.NAMES.index("rotate")
    assert turned.mean() == pytest.approx(0.7 / 25, rel=0.05)
    assert set(np.abs(m[turned] * 30).round(1)) == {6.7} and (m[turned] > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_randaugment_takes_all_operations_alike(monkeypatch):
    seen = []
    monkeypatch.setattr(policies, "apply", lambda images, number, m: seen.append((number, m)) or images)
    policies.randaugment(np.zeros((28_000, 1, 1, 1), np.uint8), 2, 9, np.random.default_rng(0))
    for number, m in seen:
        assert np.bincount(number) == pytest.approx(2000, rel=0.1) and set(np.abs(m)) == {0.3}
    assert len(seen) == 2 and "invert" not in [policies.NAMES[i] for i in np.unique(seen[0][0])]


@pytest.mark.parametrize("text", ["randaugment", "randaugment-2", "randaugment-2-31", "randaugment-0-9", "cifar10"])
def test_other_policies_are_refused(text):
    with pytest.raises(
        ValueError, match=re.escape(f"expected none, autoaugment or randaugment-N-M with M up to 30, got {text!r}")
    ):
        policies.parse(text)


def test_erasing_clears_a_rectangle_of_the_size_it_says():
    images = np.ones((4000, 2, 30, 40), np.float32)
    cleared = erase(images, 0.5, np.random.default_rng(0)) == 0
    rows, columns = cleared.any(axis=(1, 3)), cleared.any(axis=(1, 2))
    assert np.array_equal(cleared, np.broadcast_to((rows[:, :, None] & columns[:, None, :])[:, None], cleared.shape))
    sides = np.stack([rows.sum(axis=1), columns.sum(axis=1)])[:, rows.any(axis=1)]
    assert sides.shape[1] / 4000 == pytest.approx(0.5, abs=0.03)
    share, ratio = sides.prod(axis=0) / 1200, sides[0] / sides[1]
    assert 0.01 < share.min() < 0.04 and 0.35 < share.max() < 0.42 and share.mean() == pytest.approx(0.2, abs=0.02)
    assert 0.25 < ratio.min() < 0.4 and 2.5 < ratio.max() < 4
    assert cleared.any(axis=(0, 1)).all()


@settings(max_examples=20)
@given(size=st.tuples(st.integers(4, 20), st.integers(4, 20)), seed=st.integers(0, 2**32 - 1))
def test_turning_and_zooming_samples_as_torch_does(size, seed):
    """The matrices are drawn as the function draws them; pixels outside are reflected."""
    images = np.random.default_rng(seed).standard_normal((3, 2, *size)).astype(np.float32)
    got = turn_and_zoom(images, 30.0, 0.2, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    angle = np.radians(rng.uniform(-30, 30, 3))
    sy, sx = 1 + rng.uniform(-0.2, 0.2, (3, 2)).T
    h, w = size
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # of (x, y)
    theta = turn * np.array([sx, sy]) * np.array([[w, h]]).reshape(1, 2, 1) / np.array([w, h]).reshape(2, 1, 1)
    theta = torch.tensor(np.concatenate([theta, np.zeros((2, 1, 3))], axis=1).transpose(2, 0, 1), dtype=torch.float32)
    grid = torch.nn.functional.affine_grid(theta, (3, 2, h, w), align_corners=False)
    expected = torch.nn.functional.grid_sample(
        torch.tensor(images), grid, padding_mode="reflection", align_corners=False
    )
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)


def test_alternate_flips_and_repeats():
    images = np.arange(40, dtype=np.uint8).reshape(20, 1, 1, 2)
    split = ArraySplit(images, np.arange(20), [])
    keep = lambda images, labels, rng: (images, labels)
    loader = Loader(split, 5, transform=keep, alternate_flip=True)
    epochs = []
    for epoch in range(3):
        found = {
            int(y): tuple(x.ravel().tolist()) for xs, ys in loader.epoch(epoch) for x, y in zip(xs, ys, strict=True)
        }
        epochs.append([found[i] for i in range(20)])
    plain = [(2 * i, 2 * i + 1) for i in range(20)]
    assert epochs[0] == epochs[2] and 4 < sum(a == b for a, b in zip(epochs[0], plain, strict=True)) < 16
    assert all({a, b} == {p, p[::-1]} for a, b, p in zip(*epochs[:2], plain, strict=True))
    batches = [labels.tolist() for _, labels in Loader(split, 6, transform=keep, repeats=3, drop_last=True).epoch(0)]
    assert all(len(set(batch)) == 2 and batch == sorted(batch, key=batch.index) for batch in batches)
