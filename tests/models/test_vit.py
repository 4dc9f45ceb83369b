"""The whole model against a plain torch one with the same weights, and what its configuration accepts."""

import dataclasses
import json
import math

import array_api_strict
import numpy as np
import pytest
import torch
from drawing import BACKENDS, LIBRARIES, TOLERANCE, error, host
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import randomise, torch_twin

import tinyvit
from tinyvit import create_model, nn
from tinyvit import functional as F
from tinyvit.backend import random
from tinyvit.engine.tensor import Tensor, grad, no_grad
from tinyvit.models import vit
from tinyvit.models.config import ViTConfig
from tinyvit.models.positions import sincos2d
from tinyvit.models.vit import VisionTransformer

SMALL = ViTConfig(image_size=8, patch_size=4, num_classes=5, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2.0)
VARIANTS = {
    "plain": {},
    "one channel, one head, one block": dict(in_chans=1, num_heads=1, depth=1),
    "rectangular": dict(image_size=(6, 20), patch_size=(3, 5), in_chans=4),
    "one patch": dict(patch_size=8),
    "average": dict(global_pool="avg"),
    "average without a class token": dict(global_pool="avg", class_token=False),
    "average with register tokens": dict(global_pool="avg", reg_tokens=3),
    "norm before the average": dict(global_pool="avg", fc_norm=False, reg_tokens=1),
    "a stem before the patches": dict(resnet_layers=(), image_size=(33, 24), patch_size=(3, 2)),
    "a stem before the only patch": dict(resnet_layers=(), patch_size=2),
    "a ResNet before the patches": dict(resnet_layers=(2, 1), image_size=(30, 41), patch_size=(2, 1), in_chans=2),
    "register tokens": dict(reg_tokens=2),
    "register tokens outside the embedding": dict(reg_tokens=2, no_embed_class=True),
    "distilled": dict(distilled=True),
    "distilled, register tokens, layer scale": dict(distilled=True, reg_tokens=1, init_values=0.1),
    "layer scale": dict(init_values=1e-2),
    "pre-logits": dict(representation_size=7),
    "no bias of queries, keys and values": dict(qkv_bias=False),
    "tanh GELU": dict(act="gelu_tanh", mlp_ratio=2.5),
    "sines and cosines": dict(pos_embed="sincos2d", image_size=(8, 12)),
    "large epsilon": dict(norm_eps=0.1),
    "features": dict(num_classes=0),
    "features of a distilled model with pre-logits": dict(num_classes=0, distilled=True, representation_size=7),
}


def build(dtype="float32", **changes):
    with random.scope(0):
        model = VisionTransformer(SMALL.replace(**changes)).to(dtype)
    return randomise(model) if changes.get("pos_embed") != "sincos2d" else model


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
        assert error(got, want.numpy(), floor=1e-3) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_agree_with_torch(name, dtype):
    model = build(dtype, **VARIANTS[name])
    c = model.config
    images = np.random.default_rng(2).standard_normal((3, c.in_chans, *c.image_size)).astype(np.float32)
    compare(model, images.astype(np.float64), TOLERANCE[dtype])
    compare(model.train(), images[:1].astype(np.float64), TOLERANCE[dtype])  # no rates: training changes nothing


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_model_of_real_size_agrees_with_torch(dtype):
    model = tinyvit.create_model("vit_tiny_patch16_224").to(dtype)
    rng = np.random.default_rng(0)
    for name, p in model.named_parameters():  # the published initialisation, but for a head of zeros
        if name == "head.weight":
            p.data = (rng.standard_normal(p.shape) * 0.05).astype(dtype)
    images = rng.standard_normal((2, 3, 224, 224)).astype(np.float32).astype(np.float64)
    compare(model, images, TOLERANCE[dtype])


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
        (np.zeros((2, 3, 8, 9)), "expected images (B, 3, 8, 8), got (2, 3, 8, 9)"),
        (np.zeros((3, 8, 8)), "expected images (B, 3, 8, 8), got (3, 8, 8); pass one image as images[None]"),
        (np.zeros((2, 1, 8, 8)), "expected images (B, 3, 8, 8), got (2, 1, 8, 8)"),
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


# --- configuration ------------------------------------------------------------------------------------------------


def test_a_config_survives_json():
    config = SMALL.replace(image_size=(32, 64), init_values=1e-5, resnet_layers=(1, np.int64(2)))
    assert ViTConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert ViTConfig(image_size=8, patch_size=4).image_size == (8, 8)
    assert (config.grid_size, config.num_patches, config.num_tokens, config.mlp_dim) == ((1, 2), 2, 3, 24)
    assert SMALL.replace(distilled=True, reg_tokens=3).num_prefix_tokens == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=33), "image size 33x33 is not divisible by patch size 4"),
        (dict(image_size=(32, 33)), "image size 32x33 is not divisible by patch size 4"),
        (dict(image_size=(32, 33), patch_size=(4, 2)), "image size 32x33 is not divisible by patch size 4x2"),
        (
            dict(image_size=33, resnet_layers=(1, 1)),
            "image size 33x33 makes a feature map of 5x5, which is not divisible by patch size 4",
        ),
        (dict(resnet_layers=(1, 0)), "resnet_layers must be up to 4 numbers of blocks, or None, got (1, 0)"),
        (dict(resnet_layers=50), "resnet_layers must be up to 4 numbers of blocks, or None, got 50"),
        (dict(resnet_layers=(1,) * 5), f"resnet_layers must be up to 4 numbers of blocks, or None, got {(1,) * 5}"),
        (dict(fc_norm=True), """fc_norm=True needs global_pool="avg", got 'token'"""),
        (dict(image_size=0), "image_size and patch_size must be positive, got 0x0 and 4x4"),
        (dict(image_size=32.0), "image_size must be a whole number or a pair (height, width), got 32.0"),
        (dict(patch_size=(4,)), "patch_size must be a whole number or a pair (height, width), got (4,)"),
        (dict(embed_dim=13), "embed_dim 13 is not divisible by num_heads 3"),
        (dict(depth=0), "depth must be a whole number of at least 1, got 0"),
        (dict(num_heads=2.0), "num_heads must be a whole number of at least 1, got 2.0"),
        (dict(num_classes=-1), "num_classes must be a whole number of at least 0, got -1"),
        (dict(reg_tokens=-1), "reg_tokens must be a whole number of at least 0, got -1"),
        (dict(representation_size=0), "representation_size must be at least 1, or None for none, got 0"),
        (dict(mlp_ratio=0), "mlp_ratio must be positive, got 0"),
        (dict(mlp_ratio=math.nan), "mlp_ratio must be positive, got nan"),
        (dict(act="relu"), "act must be one of gelu, gelu_tanh, got 'relu'"),
        (dict(pos_embed="rope"), "pos_embed must be one of learn, sincos2d, got 'rope'"),
        (
            dict(pos_embed="sincos2d", embed_dim=6),
            "sincos2d position embeddings need embed_dim divisible by 4, got 6",
        ),
        (dict(global_pool="max"), "global_pool must be one of token, avg, got 'max'"),
        (
            dict(class_token=False),
            'global_pool "token" needs class_token=True; without one use global_pool="avg"',
        ),
        (
            dict(distilled=True, global_pool="avg"),
            'a distilled model needs global_pool="token": its heads read the class and distillation tokens',
        ),
        (dict(drop_path=1.0), "drop_path must lie in 0 ... 1 (1 excluded), got 1.0"),
        (dict(attn_drop_rate=-0.1), "attn_drop_rate must lie in 0 ... 1 (1 excluded), got -0.1"),
        (dict(drop_rate=math.nan), "drop_rate must lie in 0 ... 1 (1 excluded), got nan"),
    ],
)
def test_settings_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        SMALL.replace(**changes)
    assert str(caught.value) == message


def test_unknown_settings_are_named():
    with pytest.raises(TypeError, match="unknown model setting 'dept'; known are act, attn_drop_rate, "):
        SMALL.replace(dept=3)


@settings(max_examples=15)
@given(data=st.data())
def test_any_sound_config_makes_a_model_of_the_promised_shape(data):
    """Drawn settings: the forward pass runs, parameter shapes agree with torch's, and the config rebuilds the model."""
    heads, patch = data.draw(st.integers(1, 3)), data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    grid = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pool = data.draw(st.sampled_from(["token", "avg"]))
    config = ViTConfig(
        image_size=(grid[0] * patch[0], grid[1] * patch[1]), patch_size=patch, embed_dim=4 * heads, num_heads=heads,
        in_chans=data.draw(st.integers(1, 4)), num_classes=data.draw(st.integers(0, 4)),
        depth=data.draw(st.integers(1, 2)), mlp_ratio=data.draw(st.sampled_from([0.3, 1, 4.0])),
        fc_norm=None if pool == "token" else data.draw(st.sampled_from([None, False, True])),
        global_pool=pool, distilled=pool == "token" and data.draw(st.booleans()),
        class_token=pool == "token" or data.draw(st.booleans()), reg_tokens=data.draw(st.integers(0, 2)),
        no_embed_class=data.draw(st.booleans()), pos_embed=data.draw(st.sampled_from(["learn", "sincos2d"])),
        representation_size=data.draw(st.sampled_from([None, 5])), init_values=data.draw(st.sampled_from([None, 0.1])),
    )  # fmt: skip
    model = VisionTransformer(config)
    torch_twin(model)
    features = config.representation_size or config.embed_dim
    assert model(np.zeros((2, config.in_chans, *config.image_size), np.float32)).shape == (
        2,
        config.num_classes or features,
    )
    assert model.config is config
    VisionTransformer(ViTConfig(**config.to_dict())).load_state_dict(model.state_dict())


class Bypassed(nn.Module):
    """A user's own block around another one."""

    def __init__(self, block):
        self.block = block

    def forward(self, x):
        return x + self.block(x)


class BypassedBlock(vit.Block):
    """A user's subclass of the block."""

    def forward(self, x):
        return x + super().forward(x)


class MeanAttention(nn.Module):
    """A user's own attention: every token reads the mean of all."""

    def __init__(self, dim):
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(x - x.mean(axis=1, keepdims=True))


class ShiftedNorm(nn.LayerNorm):
    """A user's own norm."""

    def forward(self, x):
        return super().forward(x) + 0.5


class TokenNorm(nn.Module):
    """A user's norm that mixes the tokens."""

    def forward(self, x):
        return x - x.mean(axis=1, keepdims=True)


class MixingMlp(vit.Mlp):
    """A user's MLP that mixes the tokens."""

    def forward(self, x):
        return super().forward(x + x.mean(axis=1, keepdims=True))


def wrap(block):
    return Bypassed(block)


def subclass(block):
    block.__class__ = BypassedBlock
    return block


def own_attention(block):
    block.attn = MeanAttention(block.attn.proj.weight.shape[0])
    return block


def own_function(block):
    block.attn.forward = MeanAttention(block.attn.proj.weight.shape[0]).forward
    return block


def own_output(block):
    block.attn.proj = Bypassed(block.attn.proj)
    return block


def own_norm(block):
    block.norm2.__class__ = ShiftedNorm
    return block


def own_mixing_norm(block):
    block.norm2 = TokenNorm()
    return block


def own_mixing_mlp(block):
    block.mlp.__class__ = MixingMlp
    return block


OWN_LAYERS = [wrap, subclass, own_attention, own_function, own_output, own_norm, own_mixing_norm, own_mixing_mlp]


def deep_model(**changes):
    with random.scope(3):
        model = create_model("vit_micro_patch4_32", image_size=8, depth=3, num_classes=5, **changes)
    return randomise(model).eval()


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("change", OWN_LAYERS)
def test_the_model_runs_a_user_s_own_layers(change, place):
    """They take one argument and know of no shortcut; the model is what its blocks compute for all tokens."""
    model = deep_model()
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    plain = model(images).numpy()
    with random.scope(4):
        model.blocks[place] = change(model.blocks[place])
    x = model.embed(images)
    for block in model.blocks:
        x = block(x)
    expected = model.forward_head(model.norm(x)).numpy()
    assert np.allclose(model(images).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(plain, expected, rtol=1e-2)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("change", OWN_LAYERS)
def test_features_and_maps_run_a_user_s_own_layers(change, pool):
    """Each method computes with the model's own blocks, whatever their place."""
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    for place in range(3):
        model = deep_model(global_pool=pool)
        with random.scope(4):
            model.blocks[place] = change(model.blocks[place])
        x, inputs = model.embed(images), []
        for i, block in enumerate(model.blocks):
            inner = block.block if isinstance(block, Bypassed) else block
            inputs.append(inner.norm1(x))
            x = block(x)
            assert np.array_equal(model.features(images, layer=i).numpy(), x.numpy())
        assert np.allclose(model.features(images).numpy(), model.pool(model.norm(x)).numpy(), atol=1e-5)
        if change in (own_attention, own_function):
            with pytest.raises(TypeError) as caught:
                model.attention_maps(images)
            assert change is own_function or str(caught.value) == (
                f"block {place} (Block) has no attention whose weights are known: "
                "give its attention module a method attention_weights(x), (B, N, D) -> (B, heads, N, N)"
            )
            continue
        for i, got in enumerate(model.attention_maps(images).numpy()):
            inner = model.blocks[i].block if change is wrap and i == place else model.blocks[i]
            assert np.allclose(got, inner.attn.attention_weights(inputs[i]).numpy(), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, dict(distilled=True), dict(init_values=0.5)])
def test_the_shortcut_of_the_last_block_changes_neither_logits_nor_gradients(changes):
    model = deep_model(**changes).to("float64")
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    logits, whole = model(images), model.forward_head(model.forward_features(images))
    assert error(logits.numpy(), whole.numpy()) < 1e-12
    weight = np.random.default_rng(1).standard_normal(logits.shape)
    for got, want in zip(*(grad(y, model.parameters(), weight) for y in (logits, whole)), strict=True):
        assert error(got, want, floor=1e-6) < 1e-10


def test_the_last_block_computes_only_the_tokens_that_are_read(monkeypatch):
    model = create_model("vit_micro_patch4_32", image_size=8, depth=2, num_classes=5)
    seen = []
    forward = vit.Mlp.forward
    monkeypatch.setattr(vit.Mlp, "forward", lambda self, x: seen.append(tuple(x.shape)) or forward(self, x))
    model(np.zeros((2, 3, 8, 8), np.float32))
    assert seen == [(2, 5, 128), (2, 1, 128)]


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
    with pytest.raises(ValueError, match="num_classes must be a whole number"):
        model.reset_classifier("7")
