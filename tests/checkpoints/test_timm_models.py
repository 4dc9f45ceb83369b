"""timm's own models of every family that is read, shrunk and with random weights: the same outputs, and round trips."""

import re
import warnings

import numpy as np
import pytest
import timm_models
import torch
from safetensors.torch import save_file
from timm_models import timm

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model
from tinyvit.models.summary import summarise

torch.set_num_threads(1)  # the models are tiny
# One architecture for each combination of parts; bench/timm_coverage.py runs them all.
ARCHITECTURES = (
    "vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224",
    "vit_base_patch32_siglip_256", "vit_large_patch16_siglip_512", "vit_so400m_patch14_siglip_gap_224",
    "vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2",
    "aimv2_large_patch14_224", "beit3_base_patch16_224", "vit_base_patch16_radio_v3", "vit_so150m_patch16_reg4_map_256",
    "test_vit4", "deit3_small_patch16_224", "eva_giant_patch14_224", "eva_giant_patch14_clip_224",
    "eva02_tiny_patch14_224", "eva02_base_patch14_448", "eva02_base_patch16_clip_224",
    "vit_base_patch16_dinov3", "vit_base_patch16_dinov3_qkvb", "vit_huge_plus_patch16_dinov3",
    "vit_base_patch16_lingbot", "vit_pe_spatial_base_patch16_512", "vit_pe_lang_gigantic_patch14_448",
    "vit_base_patch16_rope_224",
    "vit_base_patch16_rope_ape_224", "vit_base_patch16_rope_mixed_224", "vit_base_patch16_rope_reg1_gap_256",
)  # fmt: skip
CARDS = ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224",
         "beit3_base_patch16_224", "vit_base_patch16_radio_v3")  # fmt: skip


def saved(architecture, path):
    """timm's model, its state dict in a file, images and its outputs."""
    patch = int(match[1]) if (match := re.search(r"patch(\d+)", architecture)) else 16
    model = timm_models.small(architecture, img_size=5 * patch, embed_dim=96, num_heads=4)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    images = torch.randn(2, 3, 5 * patch, 5 * patch, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, images.numpy(), model(images).numpy()


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_are_equal(architecture, tmp_path):
    path = tmp_path / f"{architecture}.safetensors"
    theirs, images, expected = saved(architecture, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_model(path, num_heads=4, image_size=images.shape[2])
    assert_equal(ours(images).numpy(), expected)
    if "rope" not in architecture and "eva" not in architecture:  # those have biases of keys, which are zero
        frozen = sum(p.size for p in ours.parameters())
        assert summarise(ours).parameters == ours.num_parameters() == frozen
    assert_equal(
        ours.features(images).numpy(),
        theirs.forward_head(theirs.forward_features(torch.tensor(images)), pre_logits=True).detach().numpy(),
    )


@pytest.mark.parametrize("architecture", CARDS)
def test_timm_opens_what_is_written(architecture, tmp_path):
    path = tmp_path / f"{architecture}.safetensors"
    _, images, expected = saved(architecture, path)
    own = tmp_path / "own.safetensors"
    model = load_model(path, num_heads=4, image_size=images.shape[2])
    convert(path, own, "tinyvit", num_heads=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of epsilons that no config.json can say
        convert(own, tmp_path / "hub", "timm")
    again = load_model(tmp_path / "hub")
    assert again.config == model.config
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(images)).numpy()
    assert np.abs(found - expected).max() <= (1e-5 if "beit3" not in architecture else 1e-3) * np.abs(expected).max()


@pytest.mark.parametrize(
    ("architecture", "part"),
    [
        ("vit_giant_patch14_dinov2", "swiglu"),
        ("aimv2_large_patch14_224", "swiglu"),
        ("vit_base_patch16_dinov3", "rope"),
    ],
)
def test_what_a_config_cannot_say_is_not_written(architecture, part, tmp_path):
    path = tmp_path / f"{architecture}.safetensors"
    _, images, expected = saved(architecture, path)
    with pytest.raises(CheckpointError, match=f"timm's config.json cannot say {part}; write a .safetensors file"):
        convert(path, tmp_path / "hub", "timm", num_heads=4)
    convert(path, tmp_path / "again.safetensors", "timm", num_heads=4)
    assert_equal(load_model(tmp_path / "again.safetensors", image_size=images.shape[2])(images).numpy(), expected)
