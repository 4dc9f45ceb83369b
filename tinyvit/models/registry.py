"""Model names, spelt as in timm, and their configurations."""

from __future__ import annotations

import difflib

from tinyvit.backend import random
from tinyvit.models.config import ViTConfig
from tinyvit.models.vit import VisionTransformer

# Dosovitskiy et al. 2020 (arXiv:2010.11929), table 1; tiny and small: Touvron et al. 2020 (arXiv:2012.12877), table 1.
_SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}
_PATCHES = {"tiny": (16,), "small": (8, 16, 32), "base": (8, 16, 32), "large": (14, 16, 32), "huge": (14,)}

_MODELS: dict[str, ViTConfig] = {
    f"vit_{size}_patch{patch}_{image}": ViTConfig(image_size=image, patch_size=patch, **_SIZES[size])
    for size, patches in _PATCHES.items()
    for patch in patches
    for image in (224, 384)
    if image % patch == 0
}
for _size in ("tiny", "small", "base"):
    for _infix, _distilled in (("", False), ("_distilled", True)):
        _MODELS[f"deit_{_size}{_infix}_patch16_224"] = ViTConfig(**_SIZES[_size], distilled=_distilled)
for _infix, _distilled in (("", False), ("_distilled", True)):
    _MODELS[f"deit_base{_infix}_patch16_384"] = ViTConfig(image_size=384, **_SIZES["base"], distilled=_distilled)
# Hybrids: the paper's R50+ViT-B/16 (its ResNet without the fourth stage), and AugReg's (Steiner et al. 2021,
# arXiv:2106.10270, section 3.3).
for _name, _size, _layers, _patch in (
    ("vit_tiny_r_s16_p8", "tiny", (), 8),
    ("vit_small_r26_s32", "small", (2, 2, 2, 2), 1),
    ("vit_base_r50_s16", "base", (3, 4, 9), 1),
    ("vit_large_r50_s32", "large", (3, 4, 6, 3), 1),
):
    for _image in (224, 384):
        _MODELS[f"{_name}_{_image}"] = ViTConfig(
            image_size=_image, patch_size=_patch, resnet_layers=_layers, **_SIZES[_size]
        )
# Sizes for 32x32 images such as CIFAR-10's.
_MODELS |= {
    name: ViTConfig(**{"image_size": 32, "num_classes": 10, **settings})
    for name, settings in {
        "vit_nano_patch8_32": dict(patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.0),
        "vit_micro_patch4_32": dict(patch_size=4, embed_dim=128, depth=6, num_heads=4, mlp_ratio=2.0),
        "vit_tiny_patch4_32": dict(patch_size=4, **_SIZES["tiny"]),
        "vit_small_patch4_32": dict(patch_size=4, **_SIZES["small"]),
        # As in Keras's example of a ViT on CIFAR-10, up to its head: every patch is read, but as a mean.
        "vit_keras_patch6_72": dict(
            image_size=72, patch_size=6, embed_dim=64, depth=8, num_heads=4, mlp_ratio=2.0,
            class_token=False, global_pool="avg",
        ),
    }.items()
}  # fmt: skip


def list_models() -> list[str]:
    """All names that `create_model` knows."""
    return list(_MODELS)


def model_config(name: str, **overrides: object) -> ViTConfig:
    """The configuration of a model, with any of its fields replaced.

    Raises:
        ValueError: an unknown name (close ones are suggested), or settings that do not fit together.
        TypeError: an unknown setting.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "tinyvit.list_models() lists them all"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return _MODELS[name].replace(**overrides)


def create_model(name: str, *, seed: int = 0, **overrides: object) -> VisionTransformer:
    """A new model with the paper's initialisation, drawn from `seed`, in training mode.

    Args:
        name: one of `list_models()`.
        seed: what the initial weights are drawn from.
        overrides: fields of `ViTConfig`, e.g. num_classes=10, image_size=32, patch_size=4, drop_path=0.1.
    """
    config = model_config(name, **overrides)
    with random.scope(seed):
        return VisionTransformer(config)
