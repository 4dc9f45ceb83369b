"""The whole model against a plain torch one with the same weights."""

import math

import array_api_strict
import numpy as np
import pytest
import torch
from drawing import BACKENDS, LIBRARIES, TOLERANCE, error, host
from reference_models import VARIANTS, build, torch_twin

import tinyvit
from tinyvit import functional as F
from tinyvit.backend import random
from tinyvit.engine.tensor import Tensor, grad, no_grad
from tinyvit.models.parts import sincos2d
from tinyvit.models.vit import VisionTransformer


def compare(model, images, tolerance):
    """Logits and every parameter's gradient; torch computes in float64."""
    twin = torch_twin(model)
    logits = model(images)
    expected = twin(torch.tensor(images))
    assert logits.shape == tuple(expected.shape)
    assert error(logits.numpy(), expected.detach().numpy(), floor=1e-3) < tolerance
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(logits.shape)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = [p for p in model.parameters() if p.requires_grad]
    gradients = grad(logits, wanted, weight.astype(logits.numpy().dtype))
    theirs = dict(twin.named_parameters())
    reference = torch.autograd.grad(expected, [theirs[name] for name in names], torch.tensor(weight))
    for name, p, got, want in zip(names, wanted, gradients, reference, strict=True):
        assert got.dtype == p.dtype and got.shape == p.shape
        floor = 1.0 if name == "seq_pool.weight.bias" else 1e-3  # a softmax does not change with it: 0 but for rounding
        assert error(got, want.numpy(), floor=floor) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_agree_with_torch(name, dtype):
    model = build(dtype, **VARIANTS[name])
    c = model.config
    images = np.random.default_rng(2).standard_normal((3, c.in_chans, *c.image_size)).astype(np.float32)
    compare(model, images.astype(np.float64), TOLERANCE[dtype])
    compare(model.train(), images[:1].astype(np.float64), TOLERANCE[dtype])  # no rates: training changes nothing


def test_a_model_of_real_size_agrees_with_torch():
    model = tinyvit.create_model("vit_tiny_patch16_224")
    rng = np.random.default_rng(0)
    for name, p in model.named_parameters():  # the published initialisation, but for a head of zeros
        if name == "head.weight":
            p.data = (rng.standard_normal(p.shape) * 0.05).astype(np.float32)
    images = rng.standard_normal((1, 3, 224, 224)).astype(np.float32).astype(np.float64)
    compare(model, images, TOLERANCE["float32"])


@pytest.mark.parametrize(
    "name", ["plain", "average with register tokens", "distilled", "pre-logits", "a stem before the only patch"]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_same_model_in_every_array_library(backend, dtype, name):
    """array_api_strict has nothing beyond the standard: the whole model, its loss and its gradients need no more."""
    xp = LIBRARIES[backend]
    settings_ = VARIANTS[name] | dict(drop_path=0.3, drop_rate=0.2, attn_drop_rate=0.2, proj_drop_rate=0.1)
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(dtype)
    results = []
    for library in (None, xp):
        model = build(dtype, **settings_)
        if library is not None:
            assert model.to(library) is model
        with random.scope(5):
            logits = model(images if library is None else library.asarray(images))
        loss = F.cross_entropy(logits, np.array([1, 4]), label_smoothing=0.1)
        gradients = grad(loss, model.parameters())
        if library is not None:
            assert all(type(x) is type(library.asarray(0.0)) for x in (logits.data, loss.data, *gradients))
            assert all(x.dtype == getattr(library, dtype) for x in (logits.data, loss.data, *gradients))
        results.append([host(x) for x in (logits.data, loss.data, *gradients)])
    for ours, theirs in zip(*results, strict=True):
        assert error(theirs, ours, floor=1e-2) < TOLERANCE[dtype]
    model.to("cpu")
    assert all(type(p.data) is np.ndarray for p in model.parameters())


def test_images_of_any_library_and_precision_follow_the_model():
    model = build()
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    expected = model(images.astype(np.float32)).data
    for given_ in (images, array_api_strict.asarray(images), Tensor(images), torch.tensor(images)):
        logits = model(given_)
        assert logits.dtype == np.float32 and np.array_equal(logits.data, expected)
    assert np.array_equal(model(np.asfortranarray(images)).data, expected)
    assert model(images[:0]).shape == (0, 5)
    wanted = Tensor(images, requires_grad=True)  # float64 into a float32 model, for saliency maps and the like
    assert grad(model(wanted).sum(), wanted).dtype == np.float64


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 3, 8, 9)), "expected images (B, 3, 8, 8), got (B, 3, 8, 9)"),
        (np.zeros((3, 8, 8)), "expected images (B, 3, 8, 8), got (3, 8, 8); pass one image as images[None]"),
        (np.zeros((2, 1, 8, 8)), "expected images (B, 3, 8, 8), got (B, 1, 8, 8)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "expected floating images, scaled and normalised, got uint8"),
        ([[1.0]], "expected an array of images (B, C, H, W), got list"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        build()(images)
    assert str(caught.value) == message


def test_features_and_head_make_the_model():
    model = build(reg_tokens=2)
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    features = model.forward_features(images)
    assert features.shape == (2, 1 + 2 + 4, 12)
    # not the same bits: the whole model computes of the last block only what its head reads
    np.testing.assert_allclose(model.forward_head(features).data, model(images).data, rtol=1e-5, atol=1e-6)
    with no_grad():
        assert not model(images).requires_grad


# --- dropout ------------------------------------------------------------------------------------------------------


RATES = ("drop_rate", "pos_drop_rate", "attn_drop_rate", "proj_drop_rate", "drop_path")


@pytest.mark.parametrize("rate", RATES)
def test_each_rate_acts_while_training_only_and_keeps_the_mean(rate):
    model = build(**{rate: 0.5})
    images = np.repeat(np.random.default_rng(0).standard_normal((1, 3, 8, 8)), 200, axis=0).astype(np.float32)
    model.eval()
    plain = model(images).data
    assert np.allclose(plain, plain[0], atol=1e-5)
    model.train()
    with random.scope(0):
        dropped = model(images).data
    with random.scope(0):
        assert np.array_equal(model(images).data, dropped)
    with random.scope(1):
        assert not np.array_equal(model(images).data, dropped)
    assert dropped.std(axis=0).max() > 1e-3


def test_drop_path_rises_linearly_with_depth_and_drops_whole_branches():
    model = build(depth=5, drop_path=0.2)
    assert [b.drop_path.p for b in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    block = build(depth=2, drop_path=0.999999).blocks[1]
    x = Tensor(np.random.default_rng(0).standard_normal((4, 5, 12)).astype(np.float32))
    with random.scope(0):
        assert np.array_equal(block(x).data, x.data)
    block.eval()
    assert not np.array_equal(block(x).data, x.data)


def test_dropout_of_attention_weights_and_of_the_head_is_where_it_belongs():
    """Dropping all that the head sees leaves its bias; dropping all attention weights leaves the projection's bias."""
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    model = build(drop_rate=0.999999)
    with random.scope(0):
        assert np.array_equal(model(images).data, np.tile(model.head.bias.data, (3, 1)))
    attention = build(attn_drop_rate=0.999999).blocks[0].attn
    with random.scope(0):
        y = attention(Tensor(np.ones((2, 3, 12), np.float32))).data
    assert np.array_equal(y, np.broadcast_to(attention.proj.bias.data, (2, 3, 12)))
    projection = build(proj_drop_rate=0.999999).blocks[0]
    with random.scope(0):
        assert not projection.attn(Tensor(np.ones((2, 3, 12), np.float32))).data.any()
        assert not projection.mlp(Tensor(np.ones((2, 3, 12), np.float32))).data.any()


# --- initialisation -----------------------------------------------------------------------------------------------


def test_the_paper_s_initialisation():
    """Xavier for the matrices, zeros for head, biases and class token, 0.02 for positions (big_vision's code)."""
    model = tinyvit.create_model("vit_tiny_patch16_224", depth=1, init_values=0.5, distilled=True, reg_tokens=4)
    p = {name: x.data for name, x in model.named_parameters()}
    for name in ("head.weight", "head.bias", "head_dist.weight", "cls_token", "dist_token", "patch_embed.proj.bias",
                 "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.bias", "norm.bias", "blocks.0.norm1.bias"):  # fmt: skip
        assert not p[name].any(), name
    for name in ("norm.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight"):
        assert (p[name] == 1).all(), name
    assert (p["blocks.0.ls1.gamma"] == 0.5).all() and (p["blocks.0.ls2.gamma"] == 0.5).all()
    for name, fan_in, fan_out in (
        ("blocks.0.attn.qkv.weight", 192, 192),  # three matrices in one
        ("blocks.0.attn.proj.weight", 192, 192),
        ("blocks.0.mlp.fc1.weight", 192, 768),
        ("blocks.0.mlp.fc2.weight", 768, 192),
    ):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert bound * 0.99 < np.abs(p[name]).max() <= bound * (1 + 1e-6), name
        assert p[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
        assert abs(p[name].mean()) < 0.01 * bound, name
    assert p["pos_embed"].std() == pytest.approx(0.02, rel=0.02)
    assert 0 < np.abs(p["blocks.0.mlp.fc1.bias"]).max() < 1e-5 and 0 < np.abs(p["reg_token"]).max() < 1e-5
    kernel = p["patch_embed.proj.weight"]
    assert kernel.std() == pytest.approx(math.sqrt(1 / 768), rel=0.02)
    assert 1.9 < np.abs(kernel).max() / math.sqrt(1 / 768) < 2 / 0.8796 + 1e-3  # truncated at two deviations
    assert all(x.dtype == np.float32 for x in p.values())


# --- position embeddings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns, dim, length", [(3, 2, 8, 7), (1, 4, 16, 4), (2, 2, 4, 6)])
def test_sines_and_cosines_follow_their_formula(rows, columns, dim, length):
    """A quarter of the channels each: sin, cos of the column, sin, cos of the row, times 10000^(-i / (dim/4 - 1))."""
    table = sincos2d((rows, columns), dim, length)
    assert table.shape == (1, length, dim) and table.dtype == np.float32
    prefix, quarter = length - rows * columns, dim // 4
    assert not table[0, :prefix].any()
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                omega = 10_000.0 ** (-i / (quarter - 1)) if quarter > 1 else 1.0
                expected = [f(position * omega) for position in (column, row) for f in (math.sin, math.cos)]
                got = table[0, prefix + row * columns + column, i::quarter]
                assert np.abs(got - expected).max() < 1e-6


def test_fixed_positions_are_saved_but_not_trained():
    model = build(pos_embed="sincos2d")
    assert "pos_embed" in model.state_dict() and not model.pos_embed.requires_grad
    assert np.array_equal(model.pos_embed.data, sincos2d((2, 2), 12, 5))


# --- another head -------------------------------------------------------------------------------------------------


def token_pool(norm, x):
    return norm(x)[:, 0, :]


def average_of_normed(norm, x):
    return norm(x)[:, 1:, :].mean(axis=1)


def norm_of_average(norm, x):
    return norm(x[:, 1:, :].mean(axis=1))


@pytest.mark.parametrize(
    "changes, pool, expected",
    [
        ({}, None, token_pool),
        (dict(distilled=True), None, token_pool),
        (dict(global_pool="avg"), None, norm_of_average),
        (dict(global_pool="avg"), "avg", norm_of_average),
        (dict(global_pool="avg"), "token", token_pool),
        (dict(global_pool="avg", fc_norm=False), "token", token_pool),
        (dict(global_pool="avg", fc_norm=False), "avg", average_of_normed),
        ({}, "avg", average_of_normed),  # as in timm, the norm stays where it is
    ],
)
def test_reset_classifier_gives_another_head_and_pooling(changes, pool, expected):
    model = build("float64", **changes).eval()
    model.class_names = tuple("abcde")
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    norm = model.fc_norm if model.config.norm_after_pool else model.norm
    model.reset_classifier(7, pool)
    assert model.config.num_classes == 7 and model.config.global_pool == (pool or changes.get("global_pool", "token"))
    assert model.class_names == () and {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    logits = model(images).numpy()
    assert logits.shape == (2, 7) and not logits.any()
    features = model.features(images).numpy()
    assert error(features, expected(norm, model.features(images, layer=-1)).numpy()) < 1e-10
    rebuilt = VisionTransformer(model.config).to("float64")
    rebuilt.load_state_dict(model.state_dict())
    assert np.array_equal(rebuilt.eval().features(images).numpy(), features)
    model.reset_classifier(0)
    assert np.array_equal(model(images).numpy(), features)
    with pytest.raises(ValueError, match="num_classes is '7', expected a whole number"):
        model.reset_classifier("7")
