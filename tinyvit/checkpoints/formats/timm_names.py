"""What the name of one of timm's models says that its weights do not."""

from __future__ import annotations

import re
from typing import Any

from tinyvit.checkpoints.formats.common import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from tinyvit.models import registry

HALF = (0.5,) * 3, (0.5,) * 3

FACTS: tuple[tuple[str, dict[str, Any]], ...] = (  # where two say the same of a model, the first counts
    (r"_rpn_", {"unsupported": "its norms behind attention and MLP (rpn)"}),
    (r"eva02_enormous", {"unsupported": "its norms behind attention and MLP"}),
    (r"sapiens2", {"unsupported": "fewer keys than queries"}),
    (r"vit_pe_core", {"unsupported": "attention pooling of the class token, too"}),
    (r"test_vit3", {"unsupported": "attention pooling of the register tokens, too"}),
    (r"lingbot", {"usual_pool": "token"}),
    (r"dinov3|lingbot", {"rope": "dinov3"}),
    (r"vit_pe_", {"rope": "pe", "rope_grid": (32, 32)}),  # the grid of patches that it was trained on
    (r"_rope_mixed", {"rope": "mixed"}),
    (r"_rope_reg\d|eva02_", {"rope": "eva", "rope_grid": (16, 16)}),
    (r"_rope_", {"rope": "axial"}),
    (r"quickgelu", {"act_layer": "quick_gelu"}),
    (
        r"(so400m|giantopt)_patch16_siglip|base_patch32_siglip|large_patch16_siglip_(gap_)?512",
        {"act_layer": "gelu_tanh"},
    ),
)
# Mean and std of the images that models were trained with, by parts of timm's names; the first that fits counts.
STATISTICS = (
    (r"sat493m", ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))),
    (r"tipsv2|_miil|_mci_", ((0.0,) * 3, (1.0,) * 3)),
    (r"large_patch14_clip_(224|336)\.laion2b", HALF),
    (r"[._]clip_|eva02_|eva_large|aimv2_|_radio_|\.bamboo|betwixt_patch16_rope_reg4_gap_256", (CLIP_MEAN, CLIP_STD)),
    (
        r"deit|dino|eva_giant|mae(?![a-z])|ijepa|samvit|rope_(mixed_)?(ape_)?224|_intern|beit3|beitv2|sapiens|lingbot",
        (IMAGENET_MEAN, IMAGENET_STD),
    ),
    (r"vit_\w+?(_patch|_r\d*_s)\d|test_vit", HALF),
)
HEADS = (  # a part of the name, the width, and the heads where they are not 64 wide
    ("giant_", 1408, 16),  # Zhai et al. 2021, arXiv:2106.04560, table 2
    ("gigantic_", 1664, 16),
    ("so400m_", 1152, 16),
    ("giantopt_", 1536, 16),
    ("base_patch16_gap_", 768, 16),
    ("huge_plus_", 1280, 20),
    ("vit_pe_", 1536, 16),
    ("vit_7b_", 4096, 32),
    *(("aimv2_", 128 * heads, heads) for heads in (8, 12, 16, 24)),
)


def facts(name: str) -> dict[str, Any]:
    """Settings; under "unsupported" a part that our models do not have."""
    found: dict[str, Any] = {}
    for pattern, said in FACTS:
        if re.search(pattern, name):
            found = said | found
    return found


def statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of the images that a model of this name was trained with; None for other names than timm's."""
    return next((found for pattern, found in STATISTICS if re.search(pattern, name)), None)


def heads(name: str, embed_dim: int) -> int | None:
    """How many attention heads a model of this name, or of the size in it, has; None where it does not say."""
    for part, width, count in HEADS:
        if part in name and width == embed_dim:
            return count
    models = registry.list_models()
    by_name = [model for model in models if model in name]
    sizes = {model: model.split("_")[1] for model in models}
    by_size = [m for m, size in sizes.items() if size.isalpha() and re.search(rf"(?<![a-z]){size}(?![a-z])", name)]
    configs = map(registry.model_config, by_name + by_size)
    return next((config.num_heads for config in configs if config.embed_dim == embed_dim), None)


def image_sizes(name: str) -> list[int]:
    """Image sizes in a name, behind that of the patches."""
    return [int(size) for size in re.findall(r"(?:patch|_[sp])\d+_(?:\w+_)?(\d{2,4})(?!\d)", name)]
