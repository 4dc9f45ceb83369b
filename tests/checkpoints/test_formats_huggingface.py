"""Transformers' ViT and DeiT load with equal outputs in every variant, and are written so that it loads them back."""

import json
import os

import numpy as np
import pytest
import torch
from checkpoint_files import assert_equal, change_config, refusal, write_own
from PIL import Image
from safetensors.numpy import load_file, save_file

import tinyvit
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model, open_checkpoint
from tinyvit.data import read_image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # the models are tiny
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=100, image_size=32, patch_size=8
)
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark", 3: "hen", 4: "ostrich"}
VARIANTS = {
    "vit": ("ViTModel", "ViTConfig", {}),
    "vit-head": ("ViTForImageClassification", "ViTConfig", {"id2label": NAMES}),
    "vit-head-options": (
        "ViTForImageClassification",
        "ViTConfig",
        {"id2label": NAMES, "hidden_act": "gelu_new", "layer_norm_eps": 0.1, "qkv_bias": False, "num_channels": 1},
    ),
    "vit-rectangles": ("ViTForImageClassification", "ViTConfig", {"image_size": [16, 40], "patch_size": [4, 8]}),
    "vit-pooler": ("ViTModel", "ViTConfig", {"pooler_output_size": 20, "hidden_act": "gelu_pytorch_tanh"}),
    "deit": ("DeiTModel", "DeiTConfig", {}),
    "deit-head": ("DeiTForImageClassification", "DeiTConfig", {"id2label": NAMES}),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {"id2label": NAMES}),
}


def make(name, seed=0):
    """A model of Transformers with random weights that are large enough to matter."""
    kind, config, options = VARIANTS[name]
    kind, config = getattr(transformers, kind), getattr(transformers, config)  # whose import takes seconds
    torch.manual_seed(seed)
    model = kind(config(**SMALL | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def random_images(model, count=3):
    size = model.config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return np.random.default_rng(0).standard_normal((count, model.config.num_channels, *size), dtype=np.float32)


def outputs(model, images):
    with torch.no_grad():
        result = model(torch.from_numpy(images).to(model.dtype))
    return (result.logits if hasattr(result, "logits") else result.pooler_output).float().numpy()


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    model = make(request.param)
    model.save_pretrained(tmp_path / "hf")
    return request.param, model, tmp_path / "hf"


# --- reading ----------------------------------------------------------------------------------------------------


def test_outputs_are_equal(variant):
    name, model, path = variant
    images = random_images(model)
    found = load_model(path)
    assert not any(module.training for _, module in found.named_modules())
    assert_equal(found(images).numpy(), outputs(model, images))
    assert_equal(load_model(path / "model.safetensors")(images).numpy(), outputs(model, images))
    labels = tuple(NAMES.values()) if "head" in name or "teacher" in name else None
    assert found.class_names == (labels or tuple(f"LABEL_{i}" for i in range(found.config.num_classes)))


def test_the_same_from_pytorch_model_bin(variant):
    _, model, path = variant
    expected = load_model(path).state_dict()
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")  # in Transformers 5 with other names than on disk
    found = load_model(path).state_dict()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(tmp_path, ending):
    model = make("vit-head")
    expected = outputs(model, random_images(model))
    model.save_pretrained(tmp_path, max_shard_size="30kB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    if ending == "bin":  # as older versions wrote them
        (tmp_path / "model.safetensors.index.json").unlink()
        for name in set(index["weight_map"].values()):
            tensors = {key: torch.from_numpy(value) for key, value in load_file(tmp_path / name).items()}
            torch.save(tensors, tmp_path / name.replace(".safetensors", ".bin"))
            (tmp_path / name).unlink()
        index["weight_map"] = {k: v.replace(".safetensors", ".bin") for k, v in index["weight_map"].items()}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_equal(load_model(tmp_path)(random_images(model)).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_half_precision_is_read_exactly(tmp_path, dtype, ending):
    model = make("deit-teacher").to(dtype)
    model.save_pretrained(tmp_path)
    if ending == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = load_model(tmp_path)
    assert {array.dtype for array in found.state_dict().values()} == {np.dtype(np.float32)}
    assert_equal(found(random_images(model)).numpy(), outputs(model.float(), random_images(model)))


def test_double_precision_stays(tmp_path):
    model = make("vit").double()
    model.save_pretrained(tmp_path)
    images = random_images(model).astype(np.float64)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).pooler_output.numpy()
    assert_equal(load_model(tmp_path)(images).numpy(), expected, relative=1e-13)


def test_the_feature_before_the_head(variant):
    name, model, path = variant
    images = random_images(model)
    base = getattr(model, "vit", getattr(model, "deit", model))
    with torch.no_grad():
        result = base(torch.from_numpy(images))
    pooled = result.pooler_output if model is base else result.last_hidden_state[:, 0]
    assert_equal(load_model(path, num_classes=0)(images).numpy(), pooled.numpy())
    if name == "vit-pooler":
        token = load_model(path, representation_size=None)(images).numpy()
        assert_equal(token, result.last_hidden_state[:, 0].numpy())


def test_a_model_without_pooler(tmp_path):
    model = make("vit")
    model.save_pretrained(tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "pooler" not in k}
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(torch.from_numpy(random_images(model))).last_hidden_state[:, 0].numpy()
    assert_equal(load_model(tmp_path)(random_images(model)).numpy(), expected)


def test_weights_that_a_classifier_does_not_use_are_passed_over(tmp_path):
    model = make("vit-head")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    shapes = {"pooler.dense.weight": (48, 48), "pooler.dense.bias": (48,), "embeddings.mask_token": (1, 1, 48)}
    unused = {f"vit.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights | unused, tmp_path / "model.safetensors")
    assert_equal(load_model(tmp_path)(random_images(model)).numpy(), outputs(model, random_images(model)))


def test_another_size_is_interpolated_as_by_transformers(tmp_path):
    """Nearly: its bicubic rule has another constant (a = -3/4) than that of timm and Pillow (-1/2)."""
    model = make("vit-head")
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 48), dtype=np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images), interpolate_pos_encoding=True).logits.numpy()
    assert_equal(load_model(tmp_path, image_size=(64, 48))(images).numpy(), expected, relative=0.1)


# --- preprocessing ----------------------------------------------------------------------------------------------

CROP = {"height": 32, "width": 32}
PROCESSORS = {
    "vit": ("ViTImageProcessor", {}),
    "deit": ("DeiTImageProcessor", {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
    "shortest edge": ("CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": CROP}),
    "odd ratio": ("DeiTImageProcessor", {"size": {"height": 46, "width": 46}, "crop_size": CROP}),
    "not normalised": ("ViTImageProcessor", {"do_normalize": False}),
    "other scale": ("ViTImageProcessor", {"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    "raw": ("ViTImageProcessor", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}),
}


def processor(name):
    kind, options = PROCESSORS[name]
    if kind == "DeiTImageProcessor" and "size" not in options:
        options = {"size": {"height": 36, "width": 36}, "crop_size": CROP, **options}
    made = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)  # not torchvision's resizing
    return made(**{"size": CROP, **options})


def photo(path):
    pixels = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((50, 61)).save(path)
    return path


def prepared(path, preprocessing, size=(32, 32)):
    pixels = read_image(path, size, **preprocessing.fit) / 255
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (pixels - mean) / std


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_by_the_processor(tmp_path, name):
    make("vit-head").save_pretrained(tmp_path)
    processor(name).save_pretrained(tmp_path)
    with Image.open(photo(tmp_path / "a.png")) as image:
        expected = processor(name)(image, return_tensors="np")["pixel_values"][0]
    found = prepared(tmp_path / "a.png", load_model(tmp_path).preprocessing)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    convert(tmp_path, tmp_path / "back", "huggingface")
    assert open_checkpoint(tmp_path / "back").preprocessing == open_checkpoint(tmp_path).preprocessing
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back", use_fast=False)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_allclose(again(image, return_tensors="np")["pixel_values"][0], expected, atol=1e-5)


def test_processors_of_older_versions(tmp_path):
    """Their sizes are single numbers, and the processor has another name."""
    make("vit-head").save_pretrained(tmp_path)
    old = {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "do_center_crop": True}
    for changes, crop_pct in (({}, 0.875), ({"do_center_crop": False}, 1.0), ({"size": 438, "crop_size": 384}, None)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**old, "resample": 3, **changes}))
        found = open_checkpoint(tmp_path).preprocessing
        assert (found.crop_mode, found.interpolation) == ("squash", "bicubic")
        assert found.crop_pct == crop_pct if crop_pct else int(384 / found.crop_pct) == 438


def test_without_a_processor_the_usual_of_the_family(variant):
    name, _, path = variant
    found = load_model(path).preprocessing
    imagenet = (0.485, 0.456, 0.406)
    assert found.mean == (imagenet if name.startswith("deit") else (0.5,) * load_model(path).config.in_chans)
    assert found.interpolation == ("bicubic" if name.startswith("deit") else "bilinear")


# --- writing ----------------------------------------------------------------------------------------------------


def test_round_trip(variant, tmp_path):
    _, model, path = variant
    convert(path, tmp_path / "back", "huggingface")
    back = type(model).from_pretrained(tmp_path / "back").eval()
    assert_equal(
        outputs(back, random_images(model)), outputs(model, random_images(model)), relative=1e-6
    )  # gelu_new has a twin
    assert back.config.id2label == model.config.id2label
    written, original = (load_file(p / "model.safetensors") for p in (tmp_path / "back", path))
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "ViTForImageClassification"),
        ({"distilled": True, "act": "gelu_tanh"}, "DeiTForImageClassificationWithTeacher"),
        ({"num_classes": 0}, None),
        ({"num_classes": 0, "representation_size": 24}, "ViTModel"),
        ({"no_embed_class": True, "norm_eps": 1e-3}, "ViTForImageClassification"),
        ({"reg_tokens": 1, "no_embed_class": True}, "DeiTForImageClassification"),
        ({"pos_embed": "sincos2d", "image_size": (16, 24), "patch_size": (8, 4)}, "ViTForImageClassification"),
    ],
)
def test_models_of_ours_are_read_by_transformers(tmp_path, options, kind):
    model = tinyvit.create_model("vit_nano_patch8_32", **options).eval()
    rng = np.random.default_rng(1)
    model.load_state_dict({name: rng.standard_normal(a.shape) * 0.2 for name, a in model.state_dict().items()})
    model.to("float32")
    names = tuple(f"class {i}" for i in range(model.config.num_classes))
    write_own(model, tmp_path / "own.safetensors", names)
    convert(tmp_path / "own.safetensors", tmp_path / "hf", "huggingface")
    images = rng.standard_normal((2, 3, *model.config.image_size), dtype=np.float32)
    back = getattr(transformers, kind or "ViTModel").from_pretrained(tmp_path / "hf").eval()
    if kind is None:
        with torch.no_grad():
            found = back(torch.from_numpy(images)).last_hidden_state[:, 0].numpy()
    else:
        found = outputs(back, images)
    assert_equal(found, model(images).numpy())
    assert_equal(load_model(tmp_path / "hf")(images).numpy(), model(images).numpy(), relative=1e-6)
    if model.config.num_classes:
        assert tuple(back.config.id2label.values()) == names == load_model(tmp_path / "hf").class_names
    assert open_checkpoint(tmp_path / "hf").preprocessing.mean == (0.4,) * 3


# --- refusing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    make("vit-head").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "beit"}, "model_type is 'beit', expected one of vit, deit, clip_vision_model"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected one of gelu"),
        ({"num_attention_heads": 5}, "embed_dim 48 is not divisible by num_heads 5"),
        ({"hidden_size": "48"}, "describes no model"),
        ({"layer_norm_eps": None}, "describes no model"),
        ({"image_size": {"height": 3}}, "describes no model"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and 2 by the weights"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, and 2 by the weights"),
        ({"image_size": 40}, "image_size is 40, and (32, 32) by the weights"),
        ({"qkv_bias": False}, "unexpected blocks.0.attn.qkv.bias"),
    ],
)
def test_configs_that_do_not_fit(directory, changes, problem):
    change_config(directory, **changes)
    assert problem in refusal(directory)


def test_every_weight_is_accounted_for(directory):
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        save_file({k: v for k, v in weights.items() if k != name}, path)
        message = refusal(directory)
        assert "missing" in message or "there is no " in message
    for kind in ("weight", "bias"):
        lost = [k for k in weights if k.endswith(tuple(f"{part}.{kind}" for part in ("query", "key", "value")))]
        assert len(lost) == 6
        save_file({k: v for k, v in weights.items() if k not in lost}, path)
        assert "missing blocks.0.attn.qkv." in refusal(directory)
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, path)
    assert "the head of a ViTForImageClassification is missing" in refusal(directory)
    assert load_model(directory, num_classes=0).config.num_classes == 0
    save_file(weights | {"vit.encoder.layer.0.extra.weight": np.ones(2, np.float32)}, path)
    assert "unexpected vit.encoder.layer.0.extra.weight" in refusal(directory)
    save_file(weights | {"cls_classifier.weight": weights["classifier.weight"]}, path)
    assert "both mean head.weight" in refusal(directory)
    save_file(weights | {"classifier.bias": np.full(5, np.nan, np.float32)}, path)
    assert "head.bias holds values that are not finite" in refusal(directory)
    save_file(weights | {"classifier.bias": np.zeros(5, np.int64)}, path)
    assert "head.bias is of dtype int64" in refusal(directory)
    for name in weights:
        save_file(weights | {name: np.ones((), np.float32)}, path)
        refusal(directory)


def test_a_teachers_head_that_is_missing_is_not_passed_over(tmp_path):
    make("deit-teacher").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "distillation_classifier" not in k}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors")
    assert "missing head_dist.weight; missing head_dist.bias" in refusal(tmp_path)


def test_the_decoder_of_a_model_for_masked_images_is_left_out(tmp_path):
    model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL))
    model.save_pretrained(tmp_path)
    found = load_model(tmp_path).state_dict()
    assert np.array_equal(found["norm.weight"], model.vit.layernorm.weight.detach().numpy())
    assert not [name for name in found if "decoder" in name or "mask" in name]


def test_directories_that_are_incomplete(directory):
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for length in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        assert "not a readable safetensors file" in refusal(directory)
    weights.write_bytes(content)
    (directory / "config.json").write_text("{")
    assert "cannot be read" in refusal(directory)
    (directory / "config.json").write_text("[]")
    assert "expected an object" in refusal(directory)
    (directory / "config.json").unlink()
    assert "need their config.json" in refusal(directory)
    weights.unlink()
    assert "not a checkpoint" in refusal(directory)


def test_shards_that_are_incomplete(directory):
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    index = directory / "model.safetensors.index.json"
    names = list(load_file(directory / "model-1.safetensors"))
    index.write_text(json.dumps({"weight_map": {name: "model-1.safetensors" for name in names}}))
    load_model(directory)
    for weight_map, problem in (
        ({names[0]: "model-2.safetensors"}, "model-2.safetensors, which is missing"),
        ({names[0]: "../model-1.safetensors"}, "weight_map"),
        ({names[0]: 3}, "weight_map"),
        ([], "weight_map"),
        ({"lost": "model-1.safetensors"}, "its files lack lost"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert problem in refusal(directory)


@pytest.mark.parametrize(
    "content", [{"size": {}}, {"size": "large"}, {"resample": 5}, {"image_mean": 3}, {"rescale_factor": 0}, {"size": 0}]
)
def test_processors_that_cannot_be_followed(directory, content):
    (directory / "preprocessor_config.json").write_text(json.dumps(content))
    assert "preprocessor_config.json cannot be followed" in refusal(directory)
