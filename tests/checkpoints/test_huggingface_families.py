"""CLIP, SigLIP, DINOv2, DINOv3 and MAE as Transformers writes them: the same outputs as its models, random weights."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
import transformers

import tinyvit
from tinyvit.checkpoints.checkpoint import CheckpointError, describe
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model, open_checkpoint
from tinyvit.checkpoints.native_file import save
from tinyvit.models.preprocessing import Preprocessing

torch.set_num_threads(1)  # the models are tiny
transformers.logging.set_verbosity_error()
SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
VISION = dict(**SIZES, intermediate_size=96)
TEXT = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99)
TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


def siglip(**changes):
    return transformers.SiglipConfig(vision_config=VISION, text_config={**TEXT, **TOKENS}, **changes)


def clip():
    return transformers.CLIPConfig(vision_config=VISION, text_config={**TEXT, **TOKENS}, projection_dim=20)


MAE = dict(**VISION, mask_ratio=0.0, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
REGISTERS = dict(num_register_tokens=3)
T = transformers


def dinov2_classifier(reads, **settings):
    """DINOv2 whose classifier reads the class token alone, or the mean of the patches alone."""
    if settings:
        model = T.Dinov2WithRegistersForImageClassification(T.Dinov2WithRegistersConfig(**SIZES, **settings))
    else:
        model = T.Dinov2ForImageClassification(T.Dinov2Config(**SIZES))
    model.other_half = slice(48, None) if reads == "token" else slice(48)
    return model


CASES = {
    "MAE": lambda: T.ViTMAEModel(T.ViTMAEConfig(**MAE)),
    "MAE with its decoder": lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(**MAE)),
    "DINOv2": lambda: T.Dinov2Model(T.Dinov2Config(**SIZES)),
    "DINOv2 giant": lambda: T.Dinov2Model(T.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
    "DINOv2 with registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**SIZES, **REGISTERS)),
    "DINOv2 with a classifier of the class token": lambda: dinov2_classifier("token"),
    "DINOv2 with registers and a classifier of the mean": lambda: dinov2_classifier("mean", **REGISTERS),
    "DINOv3": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**VISION, **REGISTERS)),
    "DINOv3 without registers": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**VISION, key_bias=True)),
    "DINOv3 plus": lambda: T.DINOv3ViTModel(
        T.DINOv3ViTConfig(**VISION, **REGISTERS, use_gated_mlp=True, hidden_act="silu")
    ),
    "CLIP": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION)),
    "CLIP with exact GELU": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION, hidden_act="gelu")),
    "CLIP with its projection": lambda: T.CLIPVisionModelWithProjection(
        T.CLIPVisionConfig(**VISION, projection_dim=20)
    ),
    "CLIP with its text tower": lambda: T.CLIPModel(clip()),
    "CLIP with a classifier": lambda: T.CLIPForImageClassification(clip()),
    "SigLIP": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**VISION)),
    "SigLIP without its head": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**VISION, vision_use_head=False)),
    "SigLIP with its text tower": lambda: T.SiglipModel(siglip()),
    "SigLIP with a classifier": lambda: T.SiglipForImageClassification(siglip(num_labels=3)),
}


def output(model, images):
    """What our model gives: logits, an image's embedding, the pooled feature or the class token."""
    with torch.no_grad():
        if isinstance(model, T.CLIPModel):
            return model.visual_projection(model.vision_model(images).pooler_output).numpy()
        if isinstance(model, T.SiglipModel | T.ViTMAEForPreTraining):
            return output(getattr(model, "vit", None) or model.vision_model, images)
        found = model(images)
        tokens = getattr(found, "last_hidden_state", None)
        if isinstance(model, T.ViTMAEModel | T.ViTModel):
            return tokens[:, 0].numpy()
        if "pooler_output" in found or tokens is None:
            return next(found[name] for name in ("logits", "image_embeds", "pooler_output") if name in found).numpy()
        return (found.image_embeds if "image_embeds" in found else tokens.mean(dim=1)).numpy()


def randomised(model):
    """The model with weights that are nowhere 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                0.2 * noise + name.endswith(("weight", "lambda1"))
                if p.ndim < 2
                else noise * max(p[0].numel(), 1) ** -0.5
            )
        if hasattr(model, "other_half"):
            model.classifier.weight[:, model.other_half] = 0
    return model.eval()


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_equal(name, tmp_path):
    model = randomised(CASES[name]())
    model.save_pretrained(tmp_path / "theirs")
    images = np.random.default_rng(1).standard_normal((2, 3, 32, 32), dtype=np.float32)
    expected = output(model, torch.tensor(images))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_model(tmp_path / "theirs")
    assert_equal(ours(images).numpy(), expected)
    assert ours.config.image_size == (32, 32)
    convert(tmp_path / "theirs", tmp_path / "back", "huggingface")
    (architecture,) = json.loads((tmp_path / "back" / "config.json").read_text())["architectures"]
    back, info = getattr(T, architecture).from_pretrained(tmp_path / "back", output_loading_info=True)
    missing = {name for names in info.values() for name in names if not name.startswith("pooler.")}
    assert not missing  # a ViTModel has a pooler that says nothing
    assert_equal(output(back.eval(), torch.tensor(images)), expected)
    again = load_model(tmp_path / "back")
    assert again.config == ours.config
    for weight, array in ours.state_dict().items():
        assert np.array_equal(again.state_dict()[weight], array), weight


def test_what_a_published_config_leaves_out(tmp_path):
    """SigLIP's config.json names the kind of its towers alone."""
    model = randomised(T.SiglipVisionModel(T.SiglipVisionConfig(**{**VISION, "num_attention_heads": 12})))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {}}))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).pooler_output.numpy()
    found = load_model(tmp_path)(images.numpy()).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_preprocessing_and_names(tmp_path):
    randomised(T.CLIPModel(clip())).save_pretrained(tmp_path)
    usual = open_checkpoint(tmp_path)
    assert usual.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4) and usual.preprocessing.crop_pct == 1
    assert not usual.names_known and len(usual.class_names) == 20  # an embedding is no class
    T.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path
    )
    given = open_checkpoint(tmp_path).preprocessing
    assert (given.mean, given.crop_pct, given.crop_mode) == ((0.1, 0.2, 0.3), 0.8, "center")


@pytest.mark.parametrize(
    ("build", "change", "problem"),
    [
        (lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**SIZES)), {}, "reads the class token and the mean"),
        (lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION)), {"model_type": "x_clip"}, "model_type is 'x_clip'"),
        (lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION)), {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (
            lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**VISION, num_register_tokens=1)),
            {"rope_theta": 50.0},
            "rope_theta is 50.0",
        ),
        (
            lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**VISION, use_gated_mlp=True)),
            {},
            "hidden_act is 'gelu' in gated MLPs",
        ),
        (lambda: T.Dinov2Model(T.Dinov2Config(**SIZES)), {"hidden_act": "silu"}, "hidden_act is 'silu' outside gated"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(build, change, problem, tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=problem) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"global_pool": "avg"}, "vit has no room for a head behind global_pool 'avg, then the norm'"),
        ({"norm": "rms_norm"}, "vit has no room for norm 'rms_norm'"),
        ({"pos_embed": "none"}, "vit has no room for pos_embed 'none'"),
        ({"distilled": True, "reg_tokens": 2}, "deit has no room for reg_tokens 2"),
        ({"distilled": True, "init_values": 0.1}, "deit has no room for init_values 0.1"),
        ({"init_values": 0.1, "mlp_ratio": 2.5}, "dinov2 has no room for MLPs of the width"),
        ({"init_values": 0.1, "image_size": (32, 48)}, "dinov2 has no room for images of (32, 48)"),
        ({"init_values": 0.1, "class_token": False, "global_pool": "map"}, "siglip_vision_model has no room for init"),
        ({"rope": "dinov3", "pos_embed": "none"}, "dinov3_vit has no room for a head behind global_pool 'token'"),
        ({"rope": "eva"}, "dinov3_vit has no room for pos_embed 'learn'"),
        ({"pre_norm": True, "swiglu": True}, "clip_vision_model has no room for swiglu True"),
        ({"pre_norm": True, "final_norm": False}, "clip_vision_model has no room for final_norm False"),
        ({"pre_norm": True, "global_pool": "avg", "fc_norm": False}, "final_norm True with global_pool 'avg'"),
        ({"class_token": False, "global_pool": "map"}, "siglip_vision_model has no room for a head behind"),
        ({"representation_size": 8}, "representation_size 8 (pre_logits) before a head"),
    ],
)
def test_what_transformers_lacks_is_not_written(tmp_path, options, problem):
    model = tinyvit.create_model("vit_nano_patch8_32", **options)
    names = tuple(map(str, range(10)))
    metadata = describe(model.config, names, Preprocessing((0.4,) * 3, (0.2,) * 3), {})
    save(tmp_path / "own.safetensors", model.state_dict(), metadata)
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        convert(tmp_path / "own.safetensors", tmp_path / "hf", "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]
