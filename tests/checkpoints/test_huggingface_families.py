"""CLIP, SigLIP, DINOv2 and DINOv3 as Transformers writes them: what configs leave out, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from checkpoint_files import write_own
from mutations import strange_copies
from safetensors.numpy import load_file, save_file
from transformers_models import CASES, SIZES, VISION, T, clip, randomised

import tinyvit
from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model, open_checkpoint

torch.set_num_threads(1)  # the models are tiny


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
    assert (
        usual.preprocessing.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
        and usual.preprocessing.crop_pct == 1
    )
    assert not usual.names_known and len(usual.class_names) == 20  # an embedding is no class
    T.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path
    )
    given = open_checkpoint(tmp_path).preprocessing
    assert (given.mean, given.crop_pct, given.crop_mode) == ((0.1, 0.2, 0.3), 0.8, "center")


FULL = ("DINOv2", "DINOv2 with registers", "DINOv3", "CLIP with its projection", "CLIP with a classifier", "SigLIP")


@pytest.mark.parametrize("name", FULL)
def test_every_weight_is_needed(name, tmp_path):
    randomised(CASES[name]()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    for lost in [weight for weight in whole if "mask_token" not in weight]:
        save_file({weight: array for weight, array in whole.items() if weight != lost}, path)
        with pytest.raises(CheckpointError) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value), lost
    for part, problem in (
        (r"(query|key|value|[qkv]_proj)\.bias", r"missing blocks\.0\.attn\.qkv\.bias"),
        (r"(^|vision_model\.)head\.", r"its attention pooling \(vision_use_head\) is missing"),
        (r"register_tokens", "num_register_tokens is 3, and 0 by the weights"),
        (r"layer_scale", r"missing blocks\.0\.ls1\.gamma"),
    ):  # all of a kind
        kept = {weight: array for weight, array in whole.items() if not re.search(part, weight)}
        if len(kept) < len(whole):
            save_file(kept, path)
            with pytest.raises(CheckpointError, match=problem):
                load_model(tmp_path)


@pytest.mark.filterwarnings("ignore")  # of names that do not number the classes
@pytest.mark.parametrize("name", ["DINOv3", "CLIP with its text tower", "SigLIP with a classifier"])
def test_strange_configs_are_refused_in_one_line_or_make_a_model(name, tmp_path):
    randomised(CASES[name]()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for copy in strange_copies(json.loads(path.read_text())):
        path.write_text(json.dumps(copy))
        try:
            model = load_model(tmp_path)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            images = np.zeros((1, 3, *model.config.image_size), np.float32)
            assert np.isfinite(model(images).numpy()).all()


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
        (lambda: T.Dinov2Model(T.Dinov2Config(**SIZES)), {"num_hidden_layers": 3}, "num_hidden_layers is 3, and 2 by"),
        (CASES["DINOv3"], {"hidden_size": 96}, "hidden_size is 96, and 48 by the weights"),
        (CASES["DINOv3"], {"image_size": 65536}, "have 67108864 patches, expected at most"),
        (CASES["CLIP"], {"image_size": 40}, r"image_size is 40, and \(32, 32\) by the weights"),
        (CASES["SigLIP with its text tower"], {"vision_config": {"patch_size": 4}}, "patch_size is 4, and"),
        (
            lambda: T.Dinov2Model(T.Dinov2Config(**SIZES)),
            {"architectures": ["Dinov2ForImageClassification"]},
            "the head of a Dinov2ForImageClassification is missing",
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
    write_own(model, tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        convert(tmp_path / "own.safetensors", tmp_path / "hf", "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]
