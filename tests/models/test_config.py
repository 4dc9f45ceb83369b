"""The configuration: what it accepts, and in which words it refuses the rest."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import SMALL, torch_twin

from tinyvit import create_model
from tinyvit.models.config import ViTConfig
from tinyvit.models.vit import VisionTransformer

SIZE = "expected a whole number from 1 to 65536, or two of them as (height, width)"
ODD_VALUES = [
    10**400,
    -(10**5000),
    1e308,
    math.inf,
    math.nan,
    "7" * 10**5,
    [],
    [[1, 2], 3],
    {},
    b"x",
    object(),
    True,
    -1,
]
STAGES = "expected at most 4 numbers of blocks from 1 to 100, or None"


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
        (dict(image_size=33), "image size 33x33 is not divisible by patch size 4: try 32x32 or 36x36"),
        (dict(image_size=3, trim_image=True), "image size 3x3 is not divisible by patch size 4: try 4x4"),
        (dict(image_size=(7, 8)), "image size 7x8 is not divisible by patch size 4: try 4x8 or 8x8"),
        (
            dict(image_size=(32, 33), patch_size=(4, 2)),
            "image size 32x33 is not divisible by patch size 4x2: try 32x32 or 32x34",
        ),
        (
            dict(image_size=33, resnet_layers=(1, 1)),
            "image size 33x33 makes a feature map of 5x5, which is not divisible by patch size 4: try 32x32 or 64x64",
        ),
        (
            dict(resnet_layers=(1, 0)),
            "resnet_layers is a tuple, " + STAGES,
        ),
        (dict(resnet_layers=50), "resnet_layers is 50, " + STAGES),
        (
            dict(resnet_layers=(1,) * 5),
            "resnet_layers is a tuple, " + STAGES,
        ),
        (
            dict(conv_chans=(8, 0)),
            "conv_chans is a tuple, expected at most 8 numbers of channels from 1 to 65536, or None",
        ),
        (
            dict(conv_chans=(8,)),
            "conv_chans (8,) makes the tokens: it needs patch_size 1 and no ResNet, got patch_size (4, 4) and "
            "resnet_layers None",
        ),
        (dict(fc_norm=True), """fc_norm=True needs global_pool="avg", got 'token'"""),
        (
            dict(image_size=0),
            "image_size is 0, " + SIZE,
        ),
        (
            dict(image_size=32.0),
            "image_size is 32.0, " + SIZE,
        ),
        (
            dict(patch_size=(4,)),
            "patch_size is a tuple, " + SIZE,
        ),
        (dict(embed_dim=13), "embed_dim 13 is not divisible by num_heads 3: try 1 or 13"),
        (dict(depth=0), "depth is 0, expected a whole number from 1 to 1000"),
        (dict(num_heads=2.0), "num_heads is 2.0, expected a whole number from 1 to 65536"),
        (dict(num_classes=-1), "num_classes is -1, expected a whole number from 0 to 1000000"),
        (dict(reg_tokens=-1), "reg_tokens is -1, expected a whole number from 0 to 65536"),
        (dict(representation_size=0), "representation_size is 0, expected a whole number from 1 to 65536"),
        (dict(mlp_ratio=0), "mlp_ratio is 0, expected a number from 1e-06 to 1e+06"),
        (dict(mlp_ratio=math.nan), "mlp_ratio is nan, expected a number from 1e-06 to 1e+06"),
        (dict(act="relu"), "act is 'relu', expected one of gelu, gelu_tanh or quick_gelu"),
        (dict(pos_embed="rope"), "pos_embed is 'rope', expected one of learn, sincos2d or none"),
        (
            dict(pos_embed="sincos2d", embed_dim=6),
            "sincos2d position embeddings need embed_dim divisible by 4, got 6",
        ),
        (dict(global_pool="max"), "global_pool is 'max', expected one of token, avg, map or seq"),
        (
            dict(class_token=False),
            'global_pool "token" needs class_token=True; without one use global_pool="avg"',
        ),
        (
            dict(distilled=True, global_pool="avg"),
            'a distilled model needs global_pool="token": its heads read the class and distillation tokens',
        ),
        (dict(drop_path=1.0), "drop_path is 1.0, expected a number from 0 to 1 (1 excluded)"),
        (dict(attn_drop_rate=-0.1), "attn_drop_rate is -0.1, expected a number from 0 to 1"),
        (dict(drop_rate=math.nan), "drop_rate is nan, expected a number from 0 to 1"),
    ],
)
def test_settings_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        SMALL.replace(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ViTConfig)])
def test_any_value_is_refused_in_one_short_line_or_makes_a_small_config(name):
    """The sizes are checked before anything is made of them."""
    for value in ODD_VALUES:
        try:
            config = SMALL.replace(**{name: value})
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 200
        else:
            assert json.loads(json.dumps(config.to_dict())) and config.num_tokens < 10**6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(depth=100_000), "depth is 100000, expected a whole number from 1 to 1000"),
        (dict(depth=1000, embed_dim=65536, num_heads=1), "a model of 3.4e+13 parameters is refused, at most 1e+11"),
        (dict(image_size=65536, patch_size=1, embed_dim=48), "a model of 2.1e+11 parameters is refused, at most 1e+11"),
        (dict(mlp_ratio=1e6, embed_dim=3000), "a model of 3.6e+13 parameters is refused, at most 1e+11"),
    ],
)
def test_absurd_sizes_are_refused_before_a_model_is_made(changes, message):
    with pytest.raises(ValueError) as caught:
        SMALL.replace(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "name, message",
    [
        ("dept", "unknown model setting 'dept'; did you mean depth?"),
        ("img_size", "unknown model setting 'img_size'; did you mean image_size?"),
        ("drop_path_rate", "unknown model setting 'drop_path_rate'; did you mean drop_path?"),
        ("hidden_size", "unknown model setting 'hidden_size'; did you mean embed_dim?"),
        ("pretrained", "there is no setting 'pretrained': tinyvit.load_model(path) opens trained weights"),
    ],
)
def test_unknown_settings_are_named(name, message):
    for function in (SMALL.replace, lambda **changes: create_model("vit_nano_patch8_32", **changes)):
        with pytest.raises(TypeError) as caught:
            function(**{name: 3})
        assert str(caught.value) == message
    with pytest.raises(TypeError, match="unknown model setting 'xyz'; known are act, attn_drop_rate, "):
        SMALL.replace(xyz=3)


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
