"""The drawn images: the same from the same seed, evenly spread, and out of a linear classifier's reach."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from tinyvit.data import load_data, read_image
from tinyvit.data.sources import shapes as shapes_module
from tinyvit.data.sources.shapes import CLASSES, SHAPES, draw


@pytest.fixture(scope="module")
def shapes():
    return load_data("shapes")


def test_sizes_and_labels(shapes):
    assert shapes.class_names == CLASSES and len(set(CLASSES)) == 10
    assert (shapes.image_size, shapes.in_chans, len(shapes.train), len(shapes.test)) == ((32, 32), 3, 8_000, 2_000)
    for split in (shapes.train, shapes.test):
        assert np.bincount(split.labels).tolist() == [len(split) // 10] * 10
        assert split.labels.dtype == np.int64
        data_set = split.read(np.array([3, 1]))
        assert data_set.shape == (2, 3, 32, 32) and data_set.dtype == np.uint8
        assert np.array_equal(data_set[::-1], split.read(np.array([1, 3])))


def test_order_is_random(shapes):
    """A stretch of images in order holds every class, as a batch without shuffling should."""
    assert len(set(shapes.test.labels[:100])) == 10
    assert not np.array_equal(shapes.train.labels[:10], shapes.train.labels[10:20])


def test_same_seed_same_images(monkeypatch):
    monkeypatch.setattr(shapes_module, "TRAIN", 600)
    monkeypatch.setattr(shapes_module, "TEST", 60)
    first, again, other = (load_data("shapes", seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.train.images, again.train.images) and first.fingerprint == again.fingerprint
    assert not np.array_equal(first.train.images[:100], other.train.images[:100])
    assert first.fingerprint != other.fingerprint
    assert np.array_equal(first.test.images, other.test.images)  # figures of different seeds can be compared


def test_train_and_test_share_no_image(shapes):
    seen = {image.tobytes() for image in shapes.train.images}
    assert len(seen) == len(shapes.train)
    assert not any(image.tobytes() in seen for image in shapes.test.images)


def test_mean_and_std(shapes):
    pixels = shapes.train.images[:, 1] / 255
    assert shapes.mean[1] == pytest.approx(pixels.mean(), abs=1e-9)
    assert shapes.std[1] == pytest.approx(pixels.std(), abs=1e-9)


def test_linear_classifier_stays_below_half(shapes):
    """Ridge regression on the pixels at half the resolution, the penalty chosen in its favour."""

    def features(split):
        pixels = split.images.reshape(-1, 3, 16, 2, 16, 2).mean(axis=(3, 5), dtype=np.float32) / 255 - 0.5
        return np.concatenate([pixels.reshape(len(split), -1), np.ones((len(split), 1), np.float32)], axis=1)

    x, x_test = features(shapes.train), features(shapes.test)
    gram, target = x.T @ x, x.T @ np.eye(10, dtype=np.float32)[shapes.train.labels]
    accuracies = []
    for penalty in (30, 100, 1000):
        weights = np.linalg.solve(gram + penalty * np.eye(len(gram), dtype=np.float32), target)
        accuracies.append(np.mean((x_test @ weights).argmax(axis=1) == shapes.test.labels))
    assert max(accuracies) < 0.4


def test_every_shape_has_its_own_area():
    """Each distance function is negative inside, positive outside, and fits the unit circle about."""
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 151), np.linspace(-1.5, 1.5, 151))
    masks = [shape(x, y) < 0 for shape in SHAPES]
    for mask in masks:
        assert 0.5 < mask.mean() * 9 < 2.6
        assert not mask[np.hypot(x, y) > 1.2].any()
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert (mask ^ other).mean() * 9 > 0.35


def test_other_sizes(monkeypatch):
    monkeypatch.setattr(shapes_module, "TRAIN", 10)
    data = load_data("shapes", image_size=(16, 24))
    assert data.image_size == (16, 24) and data.train.read(np.arange(2)).shape == (2, 3, 16, 24)


def test_images_are_recorded_as_uncut(monkeypatch):
    """Above 64 pixels too, where `read_image` would cut them unless told otherwise."""
    monkeypatch.setattr(shapes_module, "TRAIN", 10)
    monkeypatch.setattr(shapes_module, "TEST", 10)
    data = load_data("shapes", image_size=72)
    image = data.test.images[0]
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "png")
    assert np.array_equal(read_image(file, 72, **data.fit_options), image)


def test_drawing_is_fast():
    start = time.process_time()
    draw(2_000, (32, 32), np.random.default_rng(0))
    assert time.process_time() - start < 2  # seconds of one core; about 0.2 where it was written
