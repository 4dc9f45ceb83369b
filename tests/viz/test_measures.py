"""What is shown of models and outputs, against plain loops, torch's attention and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_models import VARIANTS, build

from tinyvit.viz import measures

KINDS = ("plain", "distilled", "average with register tokens")


def images_for(model, count=3):
    shape = (count, model.config.in_chans, *model.config.image_size)
    return np.random.default_rng(0).standard_normal(shape)


def weights(model, images):
    """Attention weights (depth, B, heads, N, N), which tests/models hold against torch's."""
    return model.attention_maps(images).numpy()


@pytest.mark.parametrize("name", KINDS)
def test_attention_of_what_the_head_reads(name):
    model = build("float64", **VARIANTS[name])
    images, c = images_for(model), model.config
    maps = weights(model, images)
    rows = range(1 + c.distilled) if c.global_pool == "token" else range(c.num_prefix_tokens, c.num_tokens)
    expected = sum(maps[:, :, :, row, c.num_prefix_tokens :] for row in rows) / len(rows)
    got = measures.head_attention(model, images)
    assert got.shape == (c.depth, 3, c.num_heads, *c.grid_size)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_attention_distance_is_a_weighted_mean_in_pixels(name):
    model = build("float64", **{**VARIANTS[name], "image_size": (8, 12), "patch_size": (4, 2)})
    images, c = images_for(model), model.config
    maps, (rows, columns) = weights(model, images), c.grid_size
    places = [(4.0 * r, 2.0 * k) for r in range(rows) for k in range(columns)]
    expected = np.zeros((c.depth, c.num_heads))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            p = c.num_prefix_tokens
            expected += maps[:, :, :, p + i, p + j].mean(axis=1) * ((y - v) ** 2 + (x - u) ** 2) ** 0.5 / len(places)
    np.testing.assert_allclose(measures.attention_distance(model, images), expected, rtol=1e-10)


def test_filters_are_the_directions_in_which_filters_differ():
    model = build("float64", embed_dim=24, num_heads=2, patch_size=4, image_size=8)
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((48, 2)))[0].T
    filters = 5.0 + rng.standard_normal((24, 2)) * (9, 1) @ directions  # they differ in two directions alone
    model.patch_embed.proj.weight.data = filters.reshape(24, 3, 4, 4)
    found = measures.filter_components(model, 2)
    assert found.shape == (2, 4, 4, 3)
    flat = found.transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 1)
    centred = filters - filters.mean(axis=0)
    np.testing.assert_allclose(centred @ flat.T @ flat, centred, atol=1e-9)  # nothing lies outside
    assert np.var(centred @ flat[0]) > np.var(centred @ flat[1])
    hybrid = build("float64", resnet_layers=(), image_size=32, patch_size=4)
    with pytest.raises(ValueError, match="convolutional stem are no images"):
        measures.filter_components(hybrid)


def test_similarity_of_positions():
    model = build("float64", image_size=(8, 12), patch_size=4, reg_tokens=2)
    p = model.pos_embed.numpy()[0, model.config.num_prefix_tokens :].reshape(2, 3, -1)
    got = measures.position_similarity(model)
    assert got.shape == (2, 3, 2, 3)
    for a in np.ndindex(2, 3):
        for b in np.ndindex(2, 3):
            cosine = p[a] @ p[b] / np.linalg.norm(p[a]) / np.linalg.norm(p[b])
            assert got[a + b] == pytest.approx(cosine, abs=1e-12)


@given(n=st.integers(1, 60), classes=st.integers(2, 6), bins=st.integers(1, 20), seed=st.integers(0, 99))
def test_calibration_is_scikit_learn_s(n, classes, bins, seed):
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), n)
    labels = rng.integers(classes, size=n)
    found = measures.calibrate(p, labels, bins)
    count = found[:, 2]
    accuracy, confidence = calibration_curve(p.argmax(axis=1) == labels, p.max(axis=1), n_bins=bins)
    filled = count > 0
    np.testing.assert_allclose(found[filled, :2], np.stack([confidence, accuracy], axis=1), atol=1e-12)
    assert count.sum() == n and np.isnan(found[~filled, 1]).all()
    gap = sum(c * abs(a - b) for c, a, b in zip(count[filled], accuracy, confidence, strict=True)) / n
    assert measures.calibration_error(found) == pytest.approx(gap, abs=1e-12)


def test_calibration_by_hand():
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [1.0, 0.0]])
    found = measures.calibrate(p, np.array([0, 1, 1, 0]), bins=10)
    assert found[:, 2].tolist() == [0] * 5 + [1, 0, 0, 0, 3]  # 0.6 belongs to (0.5, 0.6], 1 to the last
    assert measures.calibration_error(found) == pytest.approx((0.4 * 1 + (2.9 / 3 - 2 / 3) * 3) / 4)


def test_features_are_projected_on_their_main_directions():
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.standard_normal((9, 2)))[0]
    points = rng.standard_normal((40, 2)) * (5, 1)
    found = measures.project(3 + points @ plane.T)
    distances = np.linalg.norm(found[:, None] - found, axis=2)
    np.testing.assert_allclose(distances, np.linalg.norm(points[:, None] - points, axis=2), atol=1e-9)


@pytest.mark.parametrize("features", [np.ones((1, 5)), np.ones((10, 5))])
def test_features_that_are_few_or_alike_have_a_place(features):
    assert np.array_equal(measures.project(features), np.zeros((len(features), 2)))
