"""Model names, their sizes, and what create_model promises."""

import json
import re
from unittest import mock

import numpy as np
import pytest

import tinyvit
from tinyvit.models.config import ViTConfig
from tinyvit.models.summary import summarise
from tinyvit.models.vit import VisionTransformer
from tinyvit.nn import no_init

# Published: Dosovitskiy et al. and Touvron et al. (as counted by timm), and torchvision's table for b_16 to h_14.
PUBLISHED = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch32_224": 88_224_232,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch32_224": 306_535_400,
    "vit_huge_patch14_224": 632_045_800,
    "deit_tiny_patch16_224": 5_717_416,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "vit_tiny_r_s16_p8_224": 6_337_704,
    "vit_small_r26_s32_224": 36_431_912,
    "vit_base_r50_s16_224": 98_659_112,
    "vit_large_r50_s32_224": 328_994_856,
    "vit_large_r50_s32_384": 329_092_136,
    # The authors' code of CCT, CVT and ViT-Lite (Hassani et al. 2021, table 1 rounds these); 6.3 M of the last one.
    "vit_lite_6_patch4_32": 3_190_538,
    "vit_lite_7_patch4_32": 3_716_874,
    "cvt_6_patch4_32": 3_190_283,
    "cvt_7_patch4_32": 3_716_619,
    "cct_2_3x2_32": 283_723,
    "cct_4_3x2_32": 482_123,
    "cct_6_3x1_32": 3_233_803,
    "cct_6_3x2_32": 3_326_923,
    "cct_7_3x1_32": 3_760_139,
    "cct_7_3x2_32": 3_853_259,
    "vit_small7_patch4_32": 6_268_810,
}


def blank(name, **overrides):
    """A model whose numbers do not matter: zeros of gigabytes take a while."""
    with no_init(), mock.patch.object(np, "zeros", np.empty):
        return tinyvit.create_model(name, **overrides)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert blank(name).num_parameters() == summarise(tinyvit.model_config(name)).parameters == PUBLISHED[name]


def test_counts_at_other_sizes_are_torchvision_s():
    assert blank("vit_base_patch16_384").num_parameters() == 86_859_496
    assert blank("vit_large_patch16_224", image_size=512).num_parameters() == 305_174_504
    assert blank("vit_huge_patch14_224", image_size=518).num_parameters() == 633_470_440


def test_every_listed_model_has_a_sound_configuration():
    names = tinyvit.list_models()
    assert len(names) == len(set(names)) and set(PUBLISHED) < set(names)
    for name in names:
        config = tinyvit.model_config(name)
        assert isinstance(config, ViTConfig)
        patch = re.search(r"patch(\d+)|_p(\d+)|$", name)
        assert config.patch_size == (int(patch[1] or patch[2] or 1),) * 2, name
        size = name.rpartition("_")[2]
        assert config.image_size == (int(size),) * 2, name
        if pixels := re.search(r"_r\d+_s(\d+)_", name):
            assert config.grid_size == (int(size) // int(pixels[1]),) * 2, name
        assert config.distilled == ("distilled" in name)
        assert config.num_classes == (10 if size in ("32", "72") else 1000)
    names.clear()
    assert tinyvit.list_models()


def test_names_are_listed_by_a_pattern():
    names = tinyvit.list_models("*tiny*")
    assert names == [name for name in tinyvit.list_models() if "tiny" in name] and len(names) > 5
    assert tinyvit.list_models("vit_huge_patch14_???") == ["vit_huge_patch14_224"]
    assert tinyvit.list_models("resnet*") == []


def test_overrides_and_unknown_names():
    config = tinyvit.model_config("vit_tiny_patch16_224", num_classes=10, image_size=32, patch_size=4, drop_path=0.1)
    assert (config.embed_dim, config.depth, config.num_heads, config.num_tokens) == (192, 12, 3, 65)
    for call in (tinyvit.create_model, tinyvit.model_config):
        with pytest.raises(ValueError, match="unknown model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_"):
            call("vit_tiny_patch16_225")
        with pytest.raises(ValueError, match=r"unknown model 'resnet'; tinyvit.list_models\(\) lists them all"):
            call("resnet")
        with pytest.raises(TypeError, match="unknown model setting 'classes'; did you mean num_classes"):
            call("vit_nano_patch8_32", classes=3)
        with pytest.raises(ValueError, match=r"^vit_tiny_patch16_224: embed_dim 192 .* num_heads 5: try 4 or 6$"):
            call("vit_tiny_patch16_224", num_heads=5)


def test_the_seed_alone_decides_the_weights():
    first, same, other = (tinyvit.create_model("vit_nano_patch8_32", seed=s).state_dict() for s in (3, 3, 4))
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["blocks.1.attn.qkv.weight"], other["blocks.1.attn.qkv.weight"])
    model = tinyvit.create_model("vit_nano_patch8_32")
    assert type(model) is VisionTransformer and model.training
    assert not np.array_equal(model.blocks[0].attn.qkv.weight.data, model.blocks[1].attn.qkv.weight.data)


def test_sizes_may_be_numpy_s_numbers():
    given = tinyvit.model_config("vit_nano_patch8_32", num_classes=np.int64(7), image_size=np.int32(16))
    plain = tinyvit.model_config("vit_nano_patch8_32", num_classes=7, image_size=16)
    assert given == plain and json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
