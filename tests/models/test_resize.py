"""Weights for another image size, patch size or head: interpolated as by torch and scipy, kernels as in FlexiViT."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tinyvit
from tinyvit.checkpoints.checkpoint import BEST, CheckpointError, describe
from tinyvit.checkpoints.loading import load_model
from tinyvit.checkpoints.native_file import save
from tinyvit.models.parts import sincos2d
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.models.resize import bicubic, bilinear, resize_kernel, resize_positions

torch.set_num_threads(1)  # the models are tiny
SIZES = st.integers(1, 17)
TORCH_SIZES = st.integers(2, 17)  # torch's antialiased bicubic rule repeats the first row when columns stay one
NAMES = ("cat", "dog", "owl")


def interpolated(grid, size, **options):
    """torch's interpolation of a (rows, columns, D) grid."""
    x = torch.from_numpy(grid).permute(2, 0, 1)[None].contiguous()
    return torch.nn.functional.interpolate(x, size=size, **options)[0].permute(1, 2, 0).numpy()


@given(old=st.tuples(TORCH_SIZES, TORCH_SIZES), new=st.tuples(TORCH_SIZES, TORCH_SIZES), prefix=st.integers(0, 3))
@pytest.mark.parametrize(
    ("interpolation", "options"),
    [
        ("bicubic", {"mode": "bicubic", "antialias": True, "align_corners": False}),
        ("bilinear", {"mode": "bilinear", "align_corners": True}),
    ],
)
def test_positions_are_interpolated_as_by_torch(interpolation, options, old, new, prefix):
    positions = np.random.default_rng(0).standard_normal((1, prefix + old[0] * old[1], 4))
    found = resize_positions(positions, old, new, prefix=prefix, interpolation=interpolation)
    np.testing.assert_array_equal(found[:, :prefix], positions[:, :prefix])
    expected = interpolated(positions[0, prefix:].reshape(*old, 4), new, **options)
    np.testing.assert_allclose(found[0, prefix:].reshape(*new, 4), expected, atol=1e-12)


def test_the_bilinear_rule_is_that_of_scipys_zoom():
    """What scipy.ndimage.zoom(grid, new / 3, order=1) gives, which the original JAX code uses."""
    grid = np.array([[0, 1, 4], [9, 16, 25], [2, 3, 7]], dtype=np.float64)
    larger = [
        [0, 0.5, 1, 2.5, 4],
        [4.5, 6.5, 8.5, 11.5, 14.5],
        [9, 12.5, 16, 20.5, 25],
        [5.5, 7.5, 9.5, 12.75, 16],
        [2, 2.5, 3, 5, 7],
    ]
    for size, expected in ((5, larger), (2, [[0, 4], [2, 7]])):
        found = resize_positions(grid.reshape(1, 9, 1), (3, 3), (size, size), prefix=0, interpolation="bilinear")
        np.testing.assert_allclose(found.reshape(size, size), expected, atol=1e-12)


@given(old=SIZES, new=SIZES)
def test_rows_of_ones_stay_ones(old, new):
    for matrix in (bicubic(old, new), bilinear(old, new)):
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
        if old == new:
            np.testing.assert_allclose(matrix, np.eye(old), atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [((8, 8), (16, 16)), ((16, 16), (8, 8)), ((4, 6), (5, 3)), ((7, 7), (7, 14))])
def test_kernels_are_resized_as_in_flexivit(old, new):
    """pinv(B^T) w, with the columns of B found by resizing one pixel at a time, as timm and big_vision do."""
    kernel = np.random.default_rng(0).standard_normal((5, 3, *old))
    pixels = np.eye(old[0] * old[1]).reshape(-1, *old).transpose(1, 2, 0)
    b = interpolated(pixels, new, mode="bicubic", antialias=True, align_corners=False).reshape(new[0] * new[1], -1)
    expected = (kernel.reshape(15, -1) @ np.linalg.pinv(b)).reshape(5, 3, *new)
    np.testing.assert_allclose(resize_kernel(kernel, new), expected, atol=1e-10)


def test_an_enlarged_kernel_sees_in_enlarged_patches_what_the_old_one_saw():
    rng = np.random.default_rng(0)
    kernel, patch = rng.standard_normal((5, 3, 8, 8)), rng.standard_normal((3, 8, 8))
    rows = bicubic(8, 12)
    larger = np.einsum("ih,jw,chw->cij", rows, rows, patch)
    found = np.einsum("dcij,cij->d", resize_kernel(kernel, (12, 12)), larger)
    np.testing.assert_allclose(found, np.einsum("dchw,chw->d", kernel, patch), rtol=1e-9)


# --- through load_model -----------------------------------------------------------------------------------------


def saved(path, **overrides):
    """A run directory with a model of random weights; gives the model and the directory."""
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=3, **overrides).eval()
    rng = np.random.default_rng(0)
    model.load_state_dict({name: rng.standard_normal(a.shape, np.float32) for name, a in model.state_dict().items()})
    path.mkdir()
    save(path / BEST, model.state_dict(), describe(model.config, NAMES, Preprocessing((0.5,) * 3, (0.5,) * 3), {}))
    return model, path


def assert_equal_but(found, expected, *names):
    found, expected = found.state_dict(), expected.state_dict()
    assert {name for name in expected if not np.array_equal(found[name], expected[name])} == set(names)


@pytest.mark.parametrize("options", [{}, {"distilled": True, "reg_tokens": 2}, {"no_embed_class": True}])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_another_image_size(tmp_path, options, interpolation):
    model, path = saved(tmp_path / "run", **options)
    larger = load_model(path, image_size=(48, 40), interpolation=interpolation)
    assert larger.config == model.config.replace(image_size=(48, 40))
    assert_equal_but(larger, model, "pos_embed")
    prefix = 0 if options.get("no_embed_class") else model.config.num_prefix_tokens
    expected = resize_positions(model.pos_embed.numpy(), (4, 4), (6, 5), prefix=prefix, interpolation=interpolation)
    np.testing.assert_array_equal(larger.pos_embed.numpy(), expected)
    assert larger(np.zeros((1, 3, 48, 40), np.float32)).shape == (1, 3)
    assert (larger.class_names, larger.preprocessing) == (NAMES, load_model(path).preprocessing)


def test_a_size_with_as_many_patches_is_another_size(tmp_path):
    model, path = saved(tmp_path / "run")
    assert_equal_but(load_model(path, image_size=(16, 64)), model, "pos_embed")


def test_another_patch_size(tmp_path):
    model, path = saved(tmp_path / "run")
    finer = load_model(path, patch_size=4)
    assert finer.config.grid_size == (8, 8)
    np.testing.assert_array_equal(
        finer.patch_embed.proj.weight.numpy(), resize_kernel(model.patch_embed.proj.weight.numpy(), (4, 4))
    )
    assert_equal_but(load_model(path, patch_size=16, image_size=64), model, "patch_embed.proj.weight")


def test_fixed_positions_are_computed_anew(tmp_path):
    _, path = saved(tmp_path / "run", pos_embed="sincos2d")
    found = load_model(path, image_size=48).pos_embed.numpy()
    np.testing.assert_array_equal(found, sincos2d((6, 6), 64, 37))


@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"representation_size": 24}])
def test_another_number_of_classes_gives_heads_of_zeros(tmp_path, options):
    model, path = saved(tmp_path / "run", **options)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    found = load_model(path, num_classes=5)
    assert found.class_names == () and not found(images).numpy().any() and found(images).shape == (2, 5)
    body, expected = found.state_dict(), model.state_dict()
    assert all(np.array_equal(body[name], a) for name, a in expected.items() if not name.startswith("head"))
    assert load_model(path, num_classes=3).class_names == NAMES
    features = load_model(path, num_classes=0)
    logits = features(images).numpy() @ expected["head.weight"].T + expected["head.bias"]
    if not options.get("distilled"):
        np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-4, atol=1e-4)
    assert features.class_names == ()


def test_pre_logits_can_be_dropped_but_not_invented(tmp_path):
    _, path = saved(tmp_path / "run", representation_size=24)
    found = load_model(path, representation_size=None)
    assert found.head.weight.shape == (3, 64) and not found.head.weight.numpy().any()
    with pytest.raises(CheckpointError, match=r"missing pre_logits\.fc\.weight"):
        load_model(path, representation_size=12)


def test_two_models_of_one_checkpoint_share_nothing(tmp_path):
    from tinyvit.checkpoints.loading import open_checkpoint

    _, path = saved(tmp_path / "run")
    checkpoint = open_checkpoint(path)
    one, other = checkpoint.build(), checkpoint.build()
    before = other.state_dict()
    for parameter in one.parameters():
        parameter.data += 1
    assert all(np.array_equal(before[name], array) for name, array in other.state_dict().items())


def test_unknown_interpolation(tmp_path):
    _, path = saved(tmp_path / "run")
    with pytest.raises(ValueError, match="interpolation 'cubic' given, expected bicubic or bilinear"):
        load_model(path, image_size=64, interpolation="cubic")
