"""The summary's figures, held against published ones, hand computation and the models themselves."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_resnet import torch_backbone
from torch.utils.flop_counter import FlopCounterMode

from tinyvit.models.config import ViTConfig
from tinyvit.models.registry import create_model, list_models, model_config
from tinyvit.models.summary import summarise
from tinyvit.models.vit import VisionTransformer

EVERYTHING = dict(
    image_size=(24, 16), patch_size=(8, 4), in_chans=5, num_classes=7, embed_dim=24, depth=3, num_heads=3,
    mlp_ratio=1.5, init_values=0.1, reg_tokens=2, representation_size=11, distilled=True,
)  # fmt: skip
VARIANTS = {
    "everything": {},
    "one block, no heads": dict(depth=1, num_classes=0),
    "no biases": dict(qkv_bias=False, representation_size=None, distilled=False),
    "positions for patches only": dict(no_embed_class=True, init_values=None),
    "mean of patches": dict(distilled=False, class_token=False, global_pool="avg", reg_tokens=0),
    "mean with tokens": dict(distilled=False, global_pool="avg", act="gelu_tanh"),
    "fixed positions": dict(pos_embed="sincos2d"),
    "norm before the mean": dict(distilled=False, global_pool="avg", fc_norm=False),
    "convolutions": dict(distilled=False, class_token=False, global_pool="seq", patch_size=1, conv_chans=(8, 12)),
    "hybrid": dict(resnet_layers=(1, 2), patch_size=(3, 1)),
    "hybrid of a stem": dict(resnet_layers=(), patch_size=(3, 2)),
}


@pytest.mark.parametrize(
    "name, size, giga",
    [
        # torchvision's "GFLOPS" of the same models, which count a multiply-add once.
        ("vit_base_patch16_224", None, 17.56),
        ("vit_base_patch32_224", None, 4.41),
        ("vit_large_patch16_224", None, 61.55),
        ("vit_large_patch32_224", None, 15.38),
        ("vit_huge_patch14_224", 518, 1016.72),
    ],
)
def test_published_multiply_adds(name, size, giga):
    assert summarise(model_config(name), image_size=size).flops / 2e9 == pytest.approx(giga, abs=0.005)


@pytest.mark.parametrize("layers, size, patch", [((), (64, 48), 2), ((1, 2), (45, 64), 2), ((2, 1, 1, 1), (64, 96), 1)])
def test_multiply_adds_of_a_resnet_are_those_that_torch_counts(layers, size, patch):
    config = ViTConfig(image_size=size, resnet_layers=layers, patch_size=patch, embed_dim=8, depth=1, num_heads=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = torch_backbone(3, layers)(torch.zeros(1, 3, *size))
    rows = {row.name: row for row in summarise(config).rows}
    backbone = [row for name, row in rows.items() if name.startswith("patch_embed.backbone.")]
    assert sum(row.flops for row in backbone) == counter.get_total_flops()
    assert backbone[-1].output == tuple(features.shape)
    tokens = features.shape[2] * features.shape[3] // patch**2
    assert rows["patch_embed.proj"].flops == 2 * 8 * patch**2 * features.shape[1] * tokens


def flops_by_hand(depth, tokens, patches, patch_values, dim, hidden, classes):
    qkv, scores, values, proj = tokens * dim * 3 * dim, tokens * tokens * dim, tokens * tokens * dim, tokens * dim * dim
    mlp = 2 * tokens * dim * hidden
    return 2 * (patches * patch_values * dim + depth * (qkv + scores + values + proj + mlp) + dim * classes)


@pytest.mark.parametrize(
    "name, by_hand, figure",
    [
        ("vit_tiny_patch16_224", (12, 197, 196, 768, 192, 768, 1000), 2_507_366_400),
        ("vit_small_patch16_224", (12, 197, 196, 768, 384, 1536, 1000), 9_197_764_608),
        ("vit_base_patch16_224", (12, 197, 196, 768, 768, 3072, 1000), 35_127_656_448),
        ("vit_micro_patch4_32", (6, 65, 64, 48, 128, 256, 10), 116_004_352),
    ],
)
def test_flops_by_hand(name, by_hand, figure):
    assert summarise(model_config(name)).flops == flops_by_hand(*by_hand) == figure


def test_rectangles_tokens_and_heads_by_hand():
    summary = summarise(ViTConfig(**EVERYTHING))
    patches, tokens, dim, hidden = 3 * 4, 3 * 4 + 1 + 1 + 2, 24, 36
    expected = flops_by_hand(3, tokens, patches, 5 * 8 * 4, dim, hidden, classes=7)  # of which the distilled head's
    assert summary.flops == expected + 2 * (dim * 11 + 11 * 7)
    block = 2 * 2 * dim + (dim + 1) * 3 * dim + (dim + 1) * dim + 2 * dim + (dim + 1) * hidden + (hidden + 1) * dim
    outside = (5 * 8 * 4 + 1) * dim + (1 + 1 + 2) * dim + tokens * dim + 2 * dim
    heads = (dim + 1) * 11 + (11 + 1) * 7 + (dim + 1) * 7
    assert summary.parameters == outside + 3 * block + heads
    assert summary.parameter_bytes == 4 * summary.parameters
    shapes = {row.name: row.output for row in summary.rows}
    assert shapes["patch_embed.proj"] == (1, 12, 24)
    assert shapes["blocks.2.attn.weights"] == (1, 3, 16, 16)
    assert shapes["blocks.0.mlp.fc1"] == (1, 16, 36)
    assert shapes["pre_logits.fc"] == (1, 11)
    assert shapes["head_dist"] == (1, 7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_has_the_parameters_of_the_real_layer(variant):
    config = ViTConfig(**EVERYTHING | VARIANTS[variant])
    summary = summarise(config)
    left = {name: p.size for name, p in VisionTransformer(config).named_parameters()}
    for row in summary.rows:
        own = [name for name in left if name == row.name or name.startswith(f"{row.name}.")]
        assert row.parameters == sum(left.pop(name) for name in own), row.name
    assert not left
    assert len({row.name for row in summary.rows}) == len(summary.rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_output_is_the_models(variant):
    config = ViTConfig(**EVERYTHING | VARIANTS[variant])
    logits = VisionTransformer(config)(np.zeros((1, 5, 24, 16), np.float32))
    assert summarise(config).rows[-1].output == logits.shape


def test_a_model_and_its_config_give_the_same_and_the_image_size_can_be_changed():
    model = create_model("vit_nano_patch8_32")
    assert summarise(model) == summarise(model.config)
    assert summarise(model, image_size=(64, 32)) == summarise(model_config("vit_nano_patch8_32", image_size=(64, 32)))
    assert model.config.image_size == (32, 32)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"^summarise expects a VisionTransformer or a ViTConfig, got str$"):
        summarise("vit_nano_patch8_32")
    with pytest.raises(ValueError, match=r"^image size 33x33 is not divisible by patch size 8: try"):
        summarise(model_config("vit_nano_patch8_32"), image_size=33)


@pytest.mark.parametrize("name", ["vit_micro_patch4_32", "vit_tiny_patch4_32"])
def test_the_estimate_of_activations_is_of_the_right_size(name):
    model, batch = create_model(name), 4
    images = np.zeros((batch, 3, 32, 32), np.float32)
    tracemalloc.start()
    logits = model(images)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert logits.requires_grad
    assert 0.5 < kept / batch / summarise(model).activation_bytes < 2


def figures(line):
    """The two figures at the end of a table's line: parameters, and FLOPs as a number."""
    words = line.split()
    unit = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(words[-1])
    *_, parameters, flops = words if unit is None else words[:-1]
    return int(parameters.replace(",", "").replace("-", "0")), float(flops.replace("-", "0")) * (unit or 1)


def table_lines(summary):
    lines = summary.as_table().splitlines()
    first, second = (i for i, line in enumerate(lines) if set(line) == {"-"})
    return lines[0], lines[first + 1 : second], lines[second + 1], lines[second + 2 :]


@pytest.mark.parametrize("name", list_models())
def test_the_table_lines_up_and_adds_up(name):
    summary = summarise(model_config(name))
    header, lines, total, notes = table_lines(summary)
    assert all(len(line) <= 100 and line == line.rstrip() for line in [header, *lines, total, *notes])
    end = header.index("parameters") + len("parameters")
    assert all(len(line) == len(header) and line[end - 1] != " " and line[end] == " " for line in [*lines, total])
    outer = [figures(line) for line in lines if not line.startswith(" ")]
    inner = [figures(line) for line in lines if line.startswith(" ")]
    folded = [figures(line) for line in lines if line.startswith("blocks.")]
    depth = summary.config.depth
    assert sum(p for p, _ in outer) == figures(total)[0] == summary.parameters
    assert sum(f for _, f in outer) == pytest.approx(summary.flops, rel=1e-3)
    assert figures(total)[1] == pytest.approx(summary.flops, rel=1e-3)
    assert [depth * sum(p for p, _ in inner)] == [p for p, _ in folded]
    assert depth * sum(f for _, f in inner) == pytest.approx(folded[0][1], rel=1e-3)
    layers = summary.config.resnet_layers
    before = 2 + summary.config.class_token + summary.config.distilled + (0 if layers is None else 3 + len(layers))
    if summary.config.conv_chans is not None:
        before += 2 * len(summary.config.conv_chans) + 1
    assert f"blocks.0-{depth - 1} (x{depth})" in lines[before]
    for i, count in enumerate(layers or ()):
        assert f"backbone.stages.{i}  " in lines[3 + i] and f" (x{count}) " in lines[3 + i]
    assert len(inner) == sum(row.name.startswith("blocks.0.") for row in summary.rows)
    assert "estimate" in notes[-1] and "attention" in notes[2]


def test_a_single_block_needs_no_range():
    _, lines, _, _ = table_lines(summarise(ViTConfig(**EVERYTHING | {"depth": 1})))
    assert any(line.startswith("blocks.0  ") for line in lines)


@given(depth=st.integers(1, 4), classes=st.sampled_from([0, 3]))
def test_the_dictionary_is_json_with_every_layer(depth, classes):
    config = model_config("vit_nano_patch8_32", depth=depth, num_classes=classes)
    summary = summarise(config)
    d = json.loads(json.dumps(summary.as_dict()))
    assert ViTConfig(**d["config"]) == config
    assert sum(layer["parameters"] for layer in d["layers"]) == d["parameters"] == summary.parameters
    assert sum(layer["flops"] for layer in d["layers"]) == d["flops"] == summary.flops
    assert [layer["name"] for layer in d["layers"] if layer["name"].endswith("norm1")] == [
        f"blocks.{i}.norm1" for i in range(depth)
    ]
    assert d["parameter_bytes"] == 4 * d["parameters"] and d["activation_bytes_estimate"] == summary.activation_bytes
