"""Batch transforms: what each may do to an image, that targets follow, and the same results in another library."""

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from drawing import BACKENDS, LIBRARIES
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.backend import arrays
from tinyvit.data import Augment, Data, default_augment
from tinyvit.data.augment import cutmix, flip, mixup, normalise, one_hot, pad_and_crop
from tinyvit.data.splits import ArraySplit

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 12), st.integers(2, 12))  # (B, C, H, W)


def batch(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def one_channel_each(count, height=8, width=10):
    """Image i is 1 in channel i and 0 elsewhere, so the channels' means say which images it is mixed from."""
    return np.broadcast_to(np.eye(count, dtype=np.float32)[:, :, None, None], (count, count, height, width)).copy()


@given(shapes, seeds)
def test_normalise(shape, seed):
    rng = np.random.default_rng(seed)
    mean, std = rng.random(shape[1]), 0.1 + rng.random(shape[1])
    images = batch(shape, seed)
    result = normalise(images, tuple(mean), tuple(std))
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@given(shapes, seeds)
def test_flip_mirrors_or_leaves_alone(shape, seed):
    images = batch(shape, seed)
    for before, after in zip(images, flip(images, np.random.default_rng(seed)), strict=True):
        assert np.array_equal(after, before) or np.array_equal(after, before[:, :, ::-1])


def test_flip_mirrors_half():
    images = np.zeros((2000, 1, 1, 2), np.uint8)
    images[..., 1] = 1
    mirrored = flip(images, np.random.default_rng(0))[:, 0, 0, 0].sum()
    assert 900 < mirrored < 1100


@given(shapes, seeds, st.data())
def test_pad_and_crop_is_a_window_of_the_reflected_image(shape, seed, data):
    padding = data.draw(st.integers(0, min(shape[2:]) - 1))
    images = batch(shape, seed)
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, shape[2:], axis=(2, 3))  # (B, C, y, x, H, W)
    result = pad_and_crop(images, padding, np.random.default_rng(seed))
    for i in range(shape[0]):
        matches = (windows[i] == result[i][:, None, None]).all(axis=(0, 3, 4))  # (y, x)
        assert matches.any()


def test_pad_and_crop_reaches_every_shift_of_each_image():
    images = np.broadcast_to(np.arange(64, dtype=np.uint8).reshape(8, 8), (500, 1, 8, 8))
    centres = pad_and_crop(images, 2, np.random.default_rng(0))[:, 0, 4, 4]
    assert set(centres.tolist()) == {8 * y + x for y in range(2, 7) for x in range(2, 7)}


def test_padding_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="padding 4 given, expected less than the image's 4 pixels"):
        pad_and_crop(batch((2, 3, 4, 8)), 4, np.random.default_rng(0))


@pytest.mark.parametrize("mix", [mixup, cutmix])
@given(count=st.integers(1, 8), alpha=st.floats(0.1, 4), seed=seeds)
def test_targets_say_what_the_images_are_mixed_from(mix, count, alpha, seed):
    images = one_channel_each(count)
    mixed, targets = mix(images, np.eye(count, dtype=np.float32), alpha, np.random.default_rng(seed))
    assert mixed.dtype == targets.dtype == np.float32
    np.testing.assert_allclose(mixed.mean(axis=(2, 3)), targets, atol=1e-6)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
    assert np.array_equal(images, one_channel_each(count))  # the input is left as it was


def test_mixup_blends_whole_images_and_cutmix_pastes_boxes():
    images, labels, rng = one_channel_each(8), np.eye(8, dtype=np.float32), np.random.default_rng(0)
    blended, shares = mixup(images, labels, 1.0, rng)
    assert (blended.min(axis=(2, 3)) == blended.max(axis=(2, 3))).all() and (abs(shares - 0.5) < 0.45).any()
    pasted, _ = cutmix(images, labels, 1.0, rng)
    assert set(np.unique(pasted)) == {0, 1} and (pasted.min(axis=(2, 3)) != pasted.max(axis=(2, 3))).any()


def test_a_batch_is_mixed_in_one_of_two_ways_evenly():
    augment = Augment((0.0,) * 4, (1 / 255,) * 4, mixup=1.0, cutmix=1.0, num_classes=4)
    images = one_channel_each(4).astype(np.uint8)
    pasted = [augment(images, np.arange(4), np.random.default_rng(seed))[0] for seed in range(100)]
    assert 35 < sum(np.array_equal(x, np.round(x)) for x in pasted) < 65  # blended images are between 0 and 1


def test_one_hot():
    assert one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


RECIPES = [
    {"flip": True, "padding": 2},
    {"erasing": 0.9},
    {"mixup": 0.4},
    {"cutmix": 1.0},
    {"mixup": 0.4, "cutmix": 1.0},
]


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "numpy"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_same_result_in_another_array_library(recipe, backend):
    """To the bit, but for a fused multiplication and addition."""
    xp = LIBRARIES[backend]
    augment = Augment((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), num_classes=5, **recipe)
    images, labels = batch((4, 3, 8, 9)), np.array([0, 4, 2, 2])
    expected = augment(images, labels, np.random.default_rng(3))
    moved = (xp.asarray(array) for array in (images, labels))
    for array, other in zip(expected, augment(*moved, np.random.default_rng(3)), strict=True):
        assert arrays.namespace(other) is xp and arrays.dtype_name(other.dtype) == array.dtype.name
        np.testing.assert_allclose(arrays.to_numpy(other), array, rtol=1e-6, atol=1e-6)
        assert backend == "cupy" or np.array_equal(arrays.to_numpy(other), array)


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_a_few_numbers_an_image_go_to_a_device(recipe, monkeypatch):
    """Decisions, not masks or places of pixels: a batch of 32 images of 60x60 has 345,600 bytes."""
    sent, asarray = [], array_api_strict.asarray

    def counted(x, *args, **kwargs):
        sent.append(x.nbytes if isinstance(x, np.ndarray) else 0)
        return asarray(x, *args, **kwargs)

    augment = Augment((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), num_classes=5, **recipe)
    images, labels = asarray(batch((32, 3, 60, 60))), asarray(np.arange(32) % 5)
    monkeypatch.setattr(array_api_strict, "asarray", counted)
    augment(images, labels, np.random.default_rng(3))
    assert 0 < sum(sent) <= 64 * 32


@pytest.mark.parametrize("recipe", RECIPES)
def test_augment_depends_on_its_generator_alone(recipe):
    augment = Augment((0.5,) * 3, (0.25,) * 3, num_classes=5, **recipe)
    images, labels = batch((16, 3, 8, 8)), np.arange(16) % 5
    kept = images.copy()
    first, second, other = (augment(images, labels, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])
    assert np.array_equal(images, kept)
    assert first[0].dtype == np.float32 and first[0].shape == images.shape
    assert first[1].shape == ((16, 5) if "mixup" in recipe or "cutmix" in recipe else (16,))


def test_augment_without_options_only_normalises():
    images, labels = batch((3, 3, 5, 5)), np.arange(3)
    result = Augment((0.1, 0.2, 0.3), (1.0, 0.5, 0.2))(images, labels, np.random.default_rng(0))
    assert np.array_equal(result[0], normalise(images, (0.1, 0.2, 0.3), (1.0, 0.5, 0.2))) and result[1] is labels


def test_mixing_needs_the_number_of_classes():
    with pytest.raises(ValueError, match="num_classes"):
        Augment((0.5,), (0.5,), mixup=0.2)


@pytest.mark.parametrize(("size", "padding"), [((32, 32), 4), ((28, 40), 3), ((224, 224), 0)])
def test_default_augment(size, padding):
    split = ArraySplit(np.zeros((2, 3, *size), np.uint8), np.arange(2), [])
    data = Data("few", split, split, ("a", "b"), (0.5,) * 3, (0.2,) * 3, size, 3, "few-1")
    augment = default_augment(data)
    assert (augment.mean, augment.std, augment.flip, augment.padding) == (data.mean, data.std, True, padding)
    drawn = replace(data, fingerprint="shapes-1-0")
    assert (default_augment(drawn).flip, default_augment(drawn).padding) == (True, 0)
    assert not (augment.mixup or augment.cutmix) and augment.num_classes == 2
