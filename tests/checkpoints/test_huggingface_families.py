"""CLIP, SigLIP, DINOv2, DINOv3 and MAE as Transformers writes them: the same outputs as its models, random weights."""

import json
import warnings

import numpy as np
import pytest
import torch
import transformers

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.loading import load_model, open_checkpoint

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
T = transformers
CASES = {  # the model, and how its output is called
    "MAE": (lambda: T.ViTMAEModel(T.ViTMAEConfig(**MAE)), lambda m, x: m(x).last_hidden_state[:, 0]),
    "MAE with its decoder": (
        lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(**MAE)), lambda m, x: m.vit(x).last_hidden_state[:, 0]),
    "DINOv2": (lambda: T.Dinov2Model(T.Dinov2Config(**SIZES)), lambda m, x: m(x).pooler_output),
    "DINOv2 giant": (
        lambda: T.Dinov2Model(T.Dinov2Config(**SIZES, use_swiglu_ffn=True)), lambda m, x: m(x).pooler_output),
    "DINOv2 with registers": (
        lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
        lambda m, x: m(x).pooler_output),
    "DINOv3": (
        lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**VISION, num_register_tokens=3)), lambda m, x: m(x).pooler_output),
    "DINOv3 plus": (
        lambda: T.DINOv3ViTModel(
            T.DINOv3ViTConfig(**VISION, num_register_tokens=3, use_gated_mlp=True, hidden_act="silu")),
        lambda m, x: m(x).pooler_output),
    "CLIP": (lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION)), lambda m, x: m(x).pooler_output),
    "CLIP with exact GELU": (
        lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION, hidden_act="gelu")), lambda m, x: m(x).pooler_output),
    "CLIP with its projection": (
        lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**VISION, projection_dim=20)),
        lambda m, x: m(x).image_embeds),
    "CLIP with its text tower": (
        lambda: T.CLIPModel(clip()), lambda m, x: m.visual_projection(m.vision_model(x).pooler_output)),
    "CLIP with a classifier": (lambda: T.CLIPForImageClassification(clip()), lambda m, x: m(x).logits),
    "SigLIP": (lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**VISION)), lambda m, x: m(x).pooler_output),
    "SigLIP with its text tower": (
        lambda: T.SiglipModel(siglip()), lambda m, x: m.vision_model(x).pooler_output),
    "SigLIP with a classifier": (
        lambda: T.SiglipForImageClassification(siglip(num_labels=3)), lambda m, x: m(x).logits),
}  # fmt: skip


def randomised(model):
    """The model with weights that are nowhere 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.2 * noise + name.endswith(("weight", "lambda1")) if p.ndim < 2 else noise * p[0].numel() ** -0.5)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_equal(name, tmp_path):
    build, run = CASES[name]
    model = randomised(build())
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(1).standard_normal((2, 3, 32, 32), dtype=np.float32)
    with torch.no_grad():
        expected = run(model, torch.tensor(images)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_model(tmp_path)
    found = ours(images).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert ours.config.image_size == (32, 32)


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
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(build, change, problem, tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=problem) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
