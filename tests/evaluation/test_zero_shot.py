"""Classes by text embeddings, against Transformers' CLIP and SigLIP."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.cli import main

TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def save(model, path):
    model.save_pretrained(path)
    half = [0.5, 0.5, 0.5]
    settings = {"image_mean": half, "image_std": half, "size": {"height": 16, "width": 16}, "do_center_crop": False}
    (path / "preprocessor_config.json").write_text(json.dumps({**settings, "crop_size": {"height": 16, "width": 16}}))


def predict(path, photo, labels, capsys):
    assert main(["predict", str(path), str(photo), "--labels", str(labels), "--top", "3", "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)["predictions"][0]["classes"]
    return {c["name"]: c["probability"] for c in classes}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_probabilities_are_those_of_transformers(kind, photo, tmp_path, capsys):
    torch.manual_seed(0)
    if kind == "clip":
        text, vision = TEXT | dict(eos_token_id=39, projection_dim=24), VISION | dict(patch_size=4, projection_dim=24)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config).eval()
    else:
        text = TEXT | dict(projection_size=32)
        config = transformers.SiglipConfig(text_config=text, vision_config=VISION | dict(patch_size=4))
        model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
        if kind == "siglip":
            model.logit_bias.fill_(-0.5)
        pixels = np.asarray(Image.open(photo), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        words = torch.tensor([[1, 2, 39], [3, 4, 39], [5, 6, 39]])
        outputs = model(input_ids=words, pixel_values=torch.tensor(pixels))
        logits = outputs.logits_per_image[0]
        expected = (logits.softmax(dim=0) if kind == "clip" else logits.sigmoid()).numpy()
    save(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "own", "tinyvit")
    names = ("a cat", "a dog", "a ship")
    labels = dict(names=np.array(names), embeddings=3 * outputs.text_embeds.numpy())  # normalised again
    np.savez(tmp_path / "labels.npz", **labels)
    for path in (tmp_path / "model", tmp_path / "own"):  # scale and bias are the model's
        found = predict(path, photo, tmp_path / "labels.npz", capsys)
        assert [found[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-4)
    np.savez(tmp_path / "labels.npz", **labels, scale=np.float32(3))
    found = predict(tmp_path / "own", photo, tmp_path / "labels.npz", capsys)
    bias = model.logit_bias.item() if kind == "siglip" else 0
    logits = (logits - bias) / model.logit_scale.exp() * 3 + bias
    expected = (logits.softmax(dim=0) if kind == "clip" else logits.sigmoid()).detach()
    assert [found[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("logit_scale", torch.tensor(1e4), "describes no model of ours: math range error"),
        ("logit_scale", torch.tensor([1.0, 2.0]), "describes no model of ours"),
        ("logit_bias", torch.tensor([float("nan")]), "bias is nan"),
    ],
)
def test_a_similarity_that_is_no_number_is_refused(name, value, problem, tmp_path):
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION | dict(patch_size=4))
    save(transformers.SiglipModel(config), tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {name: value}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(embeddings=np.ones((2, 4))), "expected names"),
        (dict(names=np.array(["a"]), embeddings=np.ones((2, 4))), "1 names for 2 embeddings"),
        (dict(names=np.array(["a", "b"]), embeddings=np.zeros((2, 4))), "an embedding is zero"),
        (dict(names=np.array(["a", "b"]), embeddings=np.ones((2, 4)), scale=np.inf), "not finite"),
        (dict(names=np.array(["a"]), embeddings=np.ones((1, 4)), bias=np.ones(2)), "bias is not a single number"),
        (dict(names=np.array(["a", "b"]), embeddings=np.ones((2, 7))), "have 7 values, the model's"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(content, message, photo, tmp_path, capsys):
    import tinyvit

    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=0)
    model.preprocessing = tinyvit.models.preprocessing.Preprocessing((0.5,) * 3, (0.5,) * 3)
    tinyvit.save_model(model, tmp_path / "m.safetensors")
    np.savez(tmp_path / "labels.npz", **content)
    assert main(["predict", str(tmp_path / "m.safetensors"), str(photo), "--labels", str(tmp_path / "labels.npz")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
