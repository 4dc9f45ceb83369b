"""Hybrids: timm's and Google's files of them, by their documented names and shapes, and training one."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import error
from google_model import google_arrays, jax_forward, jax_resnet
from reference_models import TorchViT, randomise, torch_twin
from running import make_images, tinyvit
from safetensors.numpy import load_file, save_file

from tinyvit import TrainStep, nn, optim
from tinyvit.backend import random
from tinyvit.checkpoints.checkpoint import CheckpointError, describe
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model
from tinyvit.checkpoints.native_file import save
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.models.summary import summarise
from tinyvit.models.vit import VisionTransformer

torch.set_num_threads(1)  # the models are tiny
HALF = (0.5, 0.5, 0.5)
STAGES = {"stem": ((), 2), "stages": ((2, 1), 1)}  # blocks of each stage, and patch size


def config(kind, **changes):
    layers, patch = STAGES[kind]
    usual = dict(image_size=32, patch_size=patch, embed_dim=64, depth=2, num_heads=2, mlp_ratio=3.0, num_classes=5)
    return ViTConfig(**{**usual, "resnet_layers": layers, **changes})


def timm_names(layers):
    """Names and shapes of timm's HybridEmbed: a ResNetV2 that is not pre-activated, or its stem alone."""

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    stem = "backbone.stem" if layers else "backbone"
    table, inputs = {f"{stem}.conv.weight": (64, 3, 7, 7)} | norm(f"{stem}.norm", 64), 64
    for i, depth in enumerate(layers):
        inner, outputs = 64 * 2**i, 256 * 2**i
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            if j == 0:
                table |= {f"{block}.downsample.conv.weight": (outputs, inputs, 1, 1)}
                table |= norm(f"{block}.downsample.norm", outputs)
            table |= {f"{block}.conv1.weight": (inner, outputs if j else inputs, 1, 1)} | norm(f"{block}.norm1", inner)
            table |= {f"{block}.conv2.weight": (inner, inner, 3, 3)} | norm(f"{block}.norm2", inner)
            table |= {f"{block}.conv3.weight": (outputs, inner, 1, 1)} | norm(f"{block}.norm3", outputs)
        inputs = outputs
    table |= {"proj.weight": (64, inputs, 2, 2) if not layers else (64, inputs, 1, 1), "proj.bias": (64,)}
    return {f"patch_embed.{name}": shape for name, shape in table.items()}


def random_images(height=32, width=32):
    return np.random.default_rng(1).standard_normal((3, 3, height, width), dtype=np.float32)


def build(c):
    with random.scope(0):
        return randomise(VisionTransformer(c))


def expected_logits(state, c, images):
    twin = TorchViT(c).double()
    twin.load_state_dict({name: torch.from_numpy(a).double() for name, a in state.items()})
    return twin(torch.from_numpy(images).double()).detach().numpy()


def assert_equal(found, expected, relative=1e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def refusal(call, *args):
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- timm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STAGES)
def test_timm_s_files(tmp_path, kind):
    """Read with torch's logits, written again with the same names, and opened once more."""
    c = config(kind)
    state, table = build(c).state_dict(), timm_names(c.resnet_layers)
    assert {name: a.shape for name, a in state.items() if name.startswith("patch_embed.")} == table
    path = tmp_path / "vit_nano_r_s8_32.safetensors"
    save_file(state, path)
    model, expected = load_model(path, num_heads=2), expected_logits(state, c, random_images())
    assert model.config == c and model.preprocessing.mean == HALF
    assert_equal(model(random_images()).numpy(), expected)
    torch.save({"state_dict": {k: torch.from_numpy(a) for k, a in state.items()}}, tmp_path / "vit_nano_r_s8_32.pth")
    assert_equal(load_model(tmp_path / "vit_nano_r_s8_32.pth", num_heads=2)(random_images()).numpy(), expected)
    save(tmp_path / "own", state, describe(c, tuple("abcde"), Preprocessing(HALF, HALF), {}))
    assert_equal(load_model(tmp_path / "own")(random_images()).numpy(), expected)
    convert(tmp_path / "own", tmp_path / "back.safetensors", "timm")
    assert all(np.array_equal(a, state[name]) for name, a in load_file(tmp_path / "back.safetensors").items())


def test_a_hub_directory_names_the_architecture_that_has_the_stages(tmp_path):
    c = config("stem", image_size=(40, 24), global_pool="avg", fc_norm=False, in_chans=2)
    state = build(c).state_dict()
    save(tmp_path / "own", state, describe(c, tuple("abcde"), Preprocessing(HALF[:2], HALF[:2]), {}))
    convert(tmp_path / "own", tmp_path / "hub", "timm")
    card = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert card["architecture"] == "vit_tiny_r_s16_p8_224" and card["model_args"]["fc_norm"] is False
    assert card["pretrained_cfg"]["first_conv"] == "patch_embed.backbone.conv"
    found = load_model(tmp_path / "hub")
    assert found.config == c
    images = random_images(40, 24)[:, :2]
    assert_equal(found(images).numpy(), expected_logits(state, c, images))
    other = config("stages")
    save(tmp_path / "other", build(other).state_dict(), describe(other, tuple("abcde"), Preprocessing(HALF, HALF), {}))
    message = refusal(convert, tmp_path / "other", tmp_path / "no", "timm")
    assert "timm has no model with stages of (2, 1) blocks before its patches" in message
    assert "no room for resnet_layers (2, 1)" in refusal(convert, tmp_path / "other", tmp_path / "no", "huggingface")
    assert not (tmp_path / "no").exists()


def test_sizes_that_the_stride_does_not_divide_are_rounded_up(tmp_path):
    c = config("stages", image_size=(30, 41))
    state = build(c).state_dict()
    save_file(state, tmp_path / "vit_nano.safetensors")
    model = load_model(tmp_path / "vit_nano.safetensors", num_heads=2, image_size=(30, 41))
    assert model.config.grid_size == (4, 6) and model.config == c
    assert_equal(model(random_images(30, 41)).numpy(), expected_logits(state, c, random_images(30, 41)))


def test_another_image_or_patch_size_resizes_positions_and_projection_alone(tmp_path):
    model = build(config("stem"))
    save(tmp_path / "own", model.state_dict(), describe(model.config, tuple("abcde"), Preprocessing(HALF, HALF), {}))
    larger = load_model(tmp_path / "own", image_size=48)
    assert larger.config.grid_size == (6, 6) and larger(random_images(48, 48)).shape == (3, 5)
    finer = load_model(tmp_path / "own", patch_size=1)
    assert finer.patch_embed.proj.weight.shape == (64, 64, 1, 1) and finer(random_images()).shape == (3, 5)
    for found, changed in ((larger, {"pos_embed"}), (finer, {"pos_embed", "patch_embed.proj.weight"})):
        differ = {name for name, a in model.state_dict().items() if not np.array_equal(a, found.state_dict()[name])}
        assert differ == changed


# --- Google -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "four"), [("stem", True), ("stages", False)])
def test_google_s_files(tmp_path, kind, four):
    layers, patch = STAGES[kind]
    arrays = google_arrays(layers, patch, four)
    np.savez(tmp_path / "a.npz", **arrays)
    images = random_images()
    found = load_model(tmp_path / "a.npz")
    assert found.config.resnet_layers == layers and found.config.image_size == (32, 32)
    for original, tolerance in ((False, 1e-5), (True, 2e-3)):
        features = jax_resnet(arrays, images.transpose(0, 2, 3, 1), layers, original)
        assert_equal(found(images).numpy(), jax_forward(arrays, features), tolerance)
    convert(tmp_path / "a.npz", tmp_path / "back.safetensors", "timm")
    state = load_file(tmp_path / "back.safetensors")
    expected = timm_names(layers)  # of a model that is 64 wide, not 48
    assert {name for name in state if name.startswith("patch_embed.")} == expected.keys()
    assert all(state[name].shape == shape for name, shape in expected.items() if ".proj." not in name)
    convert(tmp_path / "a.npz", tmp_path / "own", "tinyvit")
    assert np.array_equal(load_model(tmp_path / "own")(images).numpy(), found(images).numpy())


def test_every_array_of_google_s_files_is_accounted_for(tmp_path):
    arrays, path = google_arrays((1,), 1), tmp_path / "a.npz"
    for name in [name for name in arrays if name.startswith(("conv_root", "gn_root", "block1"))]:
        np.savez(path, **{key: a for key, a in arrays.items() if key != name})
        assert "missing" in refusal(load_model, path) or "there is no" in refusal(load_model, path)
    for name in ("block1/unit3/conv1", "block0/unit1/conv1", "block1/unit1/conv_root", "conv1"):
        np.savez(path, **arrays, **{f"{name}/kernel": np.ones((1, 1, 256, 64), np.float32)})
        assert "missing" in refusal(load_model, path) or "unexpected" in refusal(load_model, path)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STAGES)
def test_a_training_step_is_torch_s(kind):
    model = build(config(kind))
    images, labels = random_images(), np.array([0, 3, 4])
    twin = torch_twin(model)
    step = TrainStep(model, optim.SGD(model.parameters(), lr=0.1), label_smoothing=0.1)
    loss = TF.cross_entropy(twin(torch.from_numpy(images).double()), torch.from_numpy(labels), label_smoothing=0.1)
    loss.backward()
    assert float(step(images, labels)) == pytest.approx(loss.item(), rel=1e-5)
    state = model.state_dict()
    for name, p in twin.named_parameters():
        before, moved = p.detach().numpy(), -0.1 * p.grad.numpy()
        assert error(state[name] - before, moved, floor=0.1 * np.abs(before).max()) < 1e-5, name


def test_a_frozen_resnet_gets_no_gradient_and_the_rest_the_same():
    model = build(config("stem"))
    with nn.evaluating():
        model(random_images()).sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = None
        model.patch_embed.requires_grad_(False)
        model(random_images()).sum().backward()
    for name, p in model.named_parameters():
        if name.startswith("patch_embed."):
            assert p.grad is None and expected[name] is not None
        else:
            assert np.array_equal(p.grad, expected[name])


def test_a_run_of_a_hybrid(tmp_path):
    """Trained from the command line, opened again, and used to predict."""
    folder, run = make_images(tmp_path / "images"), tmp_path / "run"
    options = ["--model", "vit_tiny_r_s16_p8_224", "--image-size", "32", "--epochs", "1", "--batch-size", "24"]
    result = tinyvit("train", "--data", folder, "--out", run, *options)
    assert result.returncode == 0, result.stderr
    model = load_model(run)
    c = model.config
    assert (c.resnet_layers, c.patch_size, c.image_size) == ((), (8, 8), (32, 32))
    image = next(folder.rglob("*.png"))
    scores = json.loads(tinyvit("predict", run, image, "--json").stdout)["predictions"][0]["classes"]
    assert {c["name"] for c in scores} <= set(model.class_names)
    assert summarise(model).parameters == model.num_parameters()
