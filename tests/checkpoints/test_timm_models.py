"""Round trips of timm's own models, shrunk and with random weights."""

import re
import warnings

import numpy as np
import pytest
import timm_models
import torch
from checkpoint_files import assert_equal
from safetensors.torch import save_file
from timm_models import timm

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.formats import timm_names
from tinyvit.checkpoints.loading import load_model

torch.set_num_threads(1)  # the models are tiny
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


def test_mean_and_std_by_name_are_timm_s():
    """Of every published model of the families that are read."""
    families = re.compile(r"(vit_|test_vit|deit|eva|dinov|flexivit|aimv2|samvit|beit3)")
    names = [name for name in timm.list_models(pretrained=True) if families.match(name)]
    told = {name: timm_names.statistics(name) or timm_names.HALF for name in names}
    cards = {name: timm.get_pretrained_cfg(name) for name in names}
    assert len(names) > 300
    assert told == {name: (card.mean, card.std) for name, card in cards.items()}
