"""README's table of what loads: its marks come from the table here, and there is a test of each.

A model that is read gives the outputs of the library that made it. A model of ours that is written gives its outputs
there. All have random weights, and are small.
"""

import functools
import json
import re
import warnings
from typing import Any, NamedTuple

import checkpoint_files
import numpy as np
import pytest
import torch
import transformers_models
from google_model import D, fixture, google_arrays, jax_forward, jax_resnet
from reference_models import build
from running import ROOT
from safetensors.numpy import save_file
from test_formats_google import big_vision, big_vision_forward
from test_formats_timm import FAMILIES, config, reference, weights

from tinyvit.checkpoints.checkpoint import Checkpoint
from tinyvit.checkpoints.convert import convert
from tinyvit.checkpoints.loading import load_model
from tinyvit.checkpoints.native_file import write_checkpoint
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.models.summary import summarise

torch.set_num_threads(1)  # the models are tiny
COLUMNS = {
    "timm": "timm: `.safetensors`, `.pth`, hub directory",
    "huggingface": "Hugging Face directory",
    "google": "Google's `.npz`",
}


class Row(NamedTuple):
    """A row of README's table.

    Attributes:
        timm: architectures of timm that are read, perhaps with options.
        huggingface: keys of transformers_models.CASES that are read.
        google: options of a file of Google's that is read.
        timm_written, huggingface_written: settings of models of ours that are written.
        note: what is said of writing to Hugging Face.
    """

    timm: tuple[str | tuple[str, dict[str, Any]], ...] = ()
    huggingface: tuple[str, ...] = ()
    google: tuple[dict[str, Any], ...] = ()
    timm_written: tuple[dict[str, Any], ...] = ()
    huggingface_written: tuple[dict[str, Any], ...] = ()
    note: str = ""


PLAIN = ({}, {"num_classes": 0})
SCALED = {"init_values": 0.1}
CLIP = {"pre_norm": True, "act": "quick_gelu", "norm_eps": 1e-5, "num_classes": 0}
SIGLIP = {"global_pool": "map", "class_token": False, "act": "gelu_tanh", "num_classes": 0}
DINOV3 = {"rope": "dinov3", "pos_embed": "none", "reg_tokens": 2, "norm_eps": 1e-5, "num_classes": 0}
NORM_FIRST = {"global_pool": "avg", "fc_norm": False}
NO_TOKEN = {"class_token": False, **NORM_FIRST}
ROWS = {
    "ViT, with a head or without": Row(
        ("vit_tiny_patch16_224", ("vit_tiny_patch16_224", {"num_classes": 0})),
        ("ViT", "ViT with a head"), ({}, {"classes": 0}), PLAIN, PLAIN,
    ),
    "tanh layer before the head (pre_logits)": Row(
        ("in21k with pre_logits",), ("ViT with a pooler",), ({"pre_logits": D},),
        (), ({"representation_size": 7, "num_classes": 0},), " without a head",
    ),
    "DeiT with distillation token and two heads": Row(
        ("deit_tiny_distilled_patch16_224",), ("DeiT with two heads",), (),
        ({"distilled": True},), ({"distilled": True},),
    ),
    "layer scale (DeiT III, DINOv2)": Row(
        ("deit3_small_patch16_224", "vit_base_patch14_dinov2"),
        ("DINOv2", "DINOv2 with a classifier of the class token"), (),
        (SCALED,), (SCALED, SCALED | NORM_FIRST, SCALED | {"num_classes": 0, "qkv_bias": False}),
    ),
    "register tokens": Row(
        ("vit_base_patch14_reg4_dinov2",),
        ("DINOv2 with registers", "DINOv2 with registers and a classifier of the mean"), (),
        ({"reg_tokens": 2},), ({"reg_tokens": 1}, {"reg_tokens": 2}, {"reg_tokens": 3, "no_embed_class": True}),
    ),
    "mean of the patches, then the norm (`fc_norm`)": Row(
        (("vit_tiny_patch16_224", {"global_pool": "avg"}),), timm_written=({"global_pool": "avg"},),
    ),
    "norm, then the mean (big_vision, I-JEPA)": Row(
        ("vit_so400m_patch14_siglip_gap_224", "vit_huge_patch14_gap_224"), ("SigLIP with a classifier",),
        ({"pool": "gap"}, {"pool": "gap", "stacked": True}), (NORM_FIRST, NO_TOKEN),
        (NO_TOKEN, NO_TOKEN | {"num_classes": 0}), " without a class token",
    ),
    "position embeddings for patches only": Row(
        ("deit3_small_patch16_224",), (), ({"pool": "tok"},), ({"no_embed_class": True},), ({"no_embed_class": True},),
    ),
    "CLIP, SigLIP (attention pooling), without their text tower": Row(
        ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224",
         ("vit_so400m_patch14_siglip_384", {"img_size": 72}),
         "vit_base_patch32_siglip_256", "vit_large_patch16_siglip_512", "vit_so150m_patch16_reg4_map_256"),
        ("CLIP", "CLIP with exact GELU", "CLIP with its projection", "CLIP with its text tower",
         "CLIP with a classifier", "SigLIP", "SigLIP with pixels beyond the last patch",
         "SigLIP without its head", "SigLIP with its text tower"), (),
        (CLIP, SIGLIP, SIGLIP | {"image_size": 11, "trim_image": True}),
        (CLIP, CLIP | {"no_embed_class": True}, CLIP | NORM_FIRST | {"final_norm": False, "num_classes": 5}, SIGLIP),
    ),
    "DINOv2 giant, DINOv3 (gated MLPs, rotary positions)": Row(
        ("vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2", "vit_base_patch16_dinov3",
         "vit_base_patch16_dinov3_qkvb", "vit_huge_plus_patch16_dinov3", "vit_base_patch16_lingbot"),
        ("DINOv2 giant", "DINOv3", "DINOv3 without registers", "DINOv3 plus"), (),
        (), (SCALED | {"swiglu": True}, DINOV3, DINOV3 | {"swiglu": True, "reg_tokens": 0, "image_size": 16},
             DINOV3 | {"qkv_bias": False, "init_values": 1.0}),
    ),
    "AIMv2, BEiT-3, EVA, EVA-02, RoPE-ViT, RADIO": Row((
        "aimv2_large_patch14_224", "beit3_base_patch16_224", "eva_giant_patch14_224", "eva_giant_patch14_clip_224",
        "eva02_tiny_patch14_224", "eva02_base_patch14_448", "eva02_base_patch16_clip_224", "vit_base_patch16_radio_v3",
        "vit_pe_spatial_base_patch16_512", "vit_pe_lang_gigantic_patch14_448", "vit_base_patch16_rope_224",
        "vit_base_patch16_rope_ape_224", "vit_base_patch16_rope_mixed_224", "vit_base_patch16_rope_reg1_gap_256",
        "test_vit4",
    )),
    "MAE, without its decoder": Row(
        (("vit_base_patch16_224", {"num_classes": 0}),), ("MAE", "MAE with its decoder"), (),
        ({"num_classes": 0, "pos_embed": "sincos2d"},), ({"num_classes": 0, "pos_embed": "sincos2d"},),
    ),
    "hybrids: R+ViT-Ti/16, R26+ViT-S/32, R50+ViT-B/16, R50+ViT-L/32": Row(
        (("vit_tiny_r_s16_p8_224", {"img_size": 64}), ("vit_small_r26_s32_224", {"img_size": 64})), (),
        ({"layers": (), "patch": 2}, {"layers": (2, 1), "patch": 1}), ({"resnet_layers": (), "patch_size": 1},),
    ),
}  # fmt: skip
READ = [(row, column, case) for row, r in ROWS.items() for column in COLUMNS for case in getattr(r, column)]
WRITTEN = [
    (row, column, changes)
    for row, r in ROWS.items()
    for column in ("timm", "huggingface")
    for changes in getattr(r, f"{column}_written")
]


def test_readme_has_the_marks_that_are_tested():
    lines = ["| model | " + " | ".join(COLUMNS.values()) + " |", "| " + "--- | " * 4]
    for name, row in ROWS.items():
        cells = []
        for column in COLUMNS:
            marks = ["read"] if getattr(row, column) else []
            if getattr(row, f"{column}_written", ()):
                marks.append("write" + (row.note if column == "huggingface" else ""))
            cells.append(", ".join(marks))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(" ".join(line.split()) for line in lines)  # a cell without marks is one space
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), f"README.md lacks this table:\n{table}"


def random_images(channels, height, width):
    return np.random.default_rng(1).standard_normal((2, channels, height, width), dtype=np.float32)


assert_equal = functools.partial(checkpoint_files.assert_equal, relative=2e-5)  # 1.01e-5 with OpenBLAS on one thread


# --- reading: each gives a path, images, the library's outputs, and what load_model needs to be told ----------------


def timm_file(case, folder):
    if isinstance(case, str) and case in FAMILIES:  # timm no longer has such models: by their names and shapes
        table, changes = FAMILIES[case]
        save_file(weights(table), folder / "vit_a_patch8.safetensors")
        images = random_images(3, 32, 32)
        expected = reference(weights(table), config(**changes), images)
        return folder / "vit_a_patch8.safetensors", images, expected, {"num_heads": 2}
    import timm_models

    architecture, options = (case, {}) if isinstance(case, str) else case
    patch = int(match[1]) if (match := re.search(r"patch(\d+)", architecture)) else 16
    options = {"img_size": 5 * patch, "embed_dim": 96, "num_heads": 4, **options}
    model = timm_models.small(architecture, **options).double()  # rounding in a deep ResNet would come near the limit
    path = folder / f"{architecture}.safetensors"
    save_file({name: np.ascontiguousarray(a.numpy()) for name, a in model.state_dict().items()}, path)
    images = random_images(3, options["img_size"], options["img_size"]).astype(np.float64)
    with torch.no_grad():
        expected = model(torch.tensor(images)).numpy()
        feature = model.forward_head(model.forward_features(torch.tensor(images)), pre_logits=True).numpy()
    given = {"num_heads": 4, "image_size": options["img_size"]}
    ours = load_model(path, **given)
    if not ours.config.distilled:
        assert_equal(ours.features(images).numpy(), feature)
    if "rope" not in architecture and "eva" not in architecture:  # those have biases of keys, which are zero
        assert summarise(ours).parameters == ours.num_parameters() == sum(p.size for p in ours.parameters())
    return path, images, expected, given


def huggingface_file(case, folder):
    model = transformers_models.randomised(transformers_models.CASES[case]())
    model.save_pretrained(folder / "theirs")
    side = getattr(model.config, "vision_config", model.config).image_size
    images = random_images(3, side, side)
    expected = transformers_models.output(model, torch.tensor(images))
    convert(folder / "theirs", folder / "back", "huggingface")
    ours, again = load_model(folder / "theirs"), load_model(folder / "back")
    assert again.config == ours.config and ours.config.image_size == (side, side)
    for name, array in ours.state_dict().items():
        assert np.array_equal(again.state_dict()[name], array), name
    assert_equal(in_transformers(folder / "back", images), expected)
    return folder / "theirs", images, expected, {}


def google_file(case, folder):
    images = random_images(3, 32, 32)
    pixels = images.transpose(0, 2, 3, 1)
    if "layers" in case:
        arrays = google_arrays(case["layers"], case["patch"])
        expected = jax_forward(arrays, jax_resnet(arrays, pixels, case["layers"], original=False))
    elif "pool" in case:
        arrays = big_vision(**case)
        expected = big_vision_forward(arrays, pixels, case["pool"], "learn")
    else:
        arrays = fixture(**case)
        expected = jax_forward(arrays, pixels)
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz", images, expected, {"image_size": 32}


@pytest.mark.parametrize(("row", "column", "case"), READ)
def test_what_is_read_gives_the_outputs_of_its_library(row, column, case, tmp_path):
    make = {"timm": timm_file, "huggingface": huggingface_file, "google": google_file}[column]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path, images, expected, given = make(case, tmp_path)
        assert_equal(load_model(path, **given)(images).numpy(), expected)


# --- writing ------------------------------------------------------------------------------------------------------


def in_timm(path, images):
    import timm_models

    model = timm_models.timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    with torch.no_grad():
        return model(torch.tensor(images)).numpy()


def in_transformers(path, images):
    (name,) = json.loads((path / "config.json").read_text())["architectures"]
    kind = getattr(transformers_models.T, name)
    model, problems = kind.from_pretrained(path, output_loading_info=True)
    missing = {name for names in problems.values() for name in names}
    assert all(name.startswith("pooler.") for name in missing)  # of a ViTModel, whose pooler then says nothing
    return transformers_models.output(model.eval(), torch.tensor(images), pooler=not missing)


@pytest.mark.parametrize(("row", "column", "changes"), WRITTEN)
def test_what_is_written_gives_our_outputs_in_the_other_library(row, column, changes, tmp_path):
    model = build(**changes)
    c = model.config
    names = tuple(f"class {i}" for i in range(c.num_classes))
    preprocessing = Preprocessing((0.4, 0.5, 0.6), (0.1, 0.2, 0.3), 0.8)
    write_checkpoint(Checkpoint("", c, model.state_dict(), names, preprocessing), tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "written", column)
    images = random_images(c.in_chans, *c.image_size)
    expected = model.eval()(images).numpy()
    assert_equal((in_timm if column == "timm" else in_transformers)(tmp_path / "written", images), expected)
    again = load_model(tmp_path / "written")
    assert_equal(again(images).numpy(), expected)
    assert again.preprocessing == preprocessing and again.class_names == names
