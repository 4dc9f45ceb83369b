"""Model names, spelt as in timm, and their configurations."""

from __future__ import annotations

import fnmatch
from typing import Any

from tinyvit.backend import random
from tinyvit.files.text import nearest
from tinyvit.models.config import ViTConfig
from tinyvit.models.vit import VisionTransformer

# Dosovitskiy et al. 2020 (arXiv:2010.11929), table 1; tiny and small: Touvron et al. 2020 (arXiv:2012.12877), table 1.
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}
_PATCHES = {"tiny": (16,), "small": (8, 16, 32), "base": (8, 16, 32), "large": (14, 16, 32), "huge": (14,)}
# Hybrids: the paper's R50+ViT-B/16 (its ResNet without the fourth stage), and AugReg's (Steiner et al. 2021,
# arXiv:2106.10270, section 3.3).
_HYBRIDS = {
    "vit_tiny_r_s16_p8": dict(resnet_layers=(), patch_size=8, **_SIZES["tiny"]),
    "vit_small_r26_s32": dict(resnet_layers=(2, 2, 2, 2), patch_size=1, **_SIZES["small"]),
    "vit_base_r50_s16": dict(resnet_layers=(3, 4, 9), patch_size=1, **_SIZES["base"]),
    "vit_large_r50_s32": dict(resnet_layers=(3, 4, 6, 3), patch_size=1, **_SIZES["large"]),
}
_LITTLE: dict[str, Any] = dict(embed_dim=128, num_heads=2, mlp_ratio=1.0, qkv_bias=False, norm_eps=1e-5)
_LITE: dict[str, Any] = dict(embed_dim=256, num_heads=4, mlp_ratio=2.0, qkv_bias=False, norm_eps=1e-5)
_SEQ: dict[str, Any] = dict(class_token=False, global_pool="seq")
# Sizes for 32x32 images such as CIFAR-10's.
_SMALL_IMAGES = {
    "vit_nano_patch8_32": dict(patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.0),
    "vit_micro_patch4_32": dict(patch_size=4, embed_dim=128, depth=6, num_heads=4, mlp_ratio=2.0),
    "vit_tiny_patch4_32": dict(patch_size=4, **_SIZES["tiny"]),
    "vit_small_patch4_32": dict(patch_size=4, **_SIZES["small"]),
    # ViT-Lite, CVT and CCT: Hassani et al. 2021 (arXiv:2104.05704), table 1, with the ViT's usual blocks (theirs also
    # normalise what is added to). In the names: patch size, or the convolutions' width and number.
    **{f"vit_lite_{depth}_patch4_32": dict(patch_size=4, depth=depth, **_LITE) for depth in (6, 7)},
    **{f"cvt_{depth}_patch4_32": dict(patch_size=4, depth=depth, **_LITE, **_SEQ) for depth in (6, 7)},
    **{
        f"cct_{depth}_3x{convs}_32": dict(patch_size=1, conv_chans=(64,) * (convs - 1), depth=depth, **size, **_SEQ)
        for depth, convs, size in (
            (2, 2, _LITTLE), (4, 2, _LITTLE), (6, 1, _LITE), (6, 2, _LITE), (7, 1, _LITE), (7, 2, _LITE)
        )
    },
    # Three convolutions leave 16 tokens: most accurate for its time on CPUs.
    "cct_2_3x3_32": dict(
        patch_size=1, conv_chans=(32, 64), embed_dim=128, depth=2, num_heads=4, mlp_ratio=2.0, qkv_bias=False, **_SEQ
    ),
    # The ViT of 6.3 M parameters that comes to 91 % on CIFAR-10 in 200 epochs, but for a second GELU in each MLP.
    "vit_small7_patch4_32": dict(patch_size=4, embed_dim=384, depth=7, num_heads=12, mlp_ratio=1.0),
    # As in Keras's example of a ViT on CIFAR-10, up to its head: it reads every patch, but as a mean.
    "vit_keras_patch6_72": dict(
        image_size=72, patch_size=6, embed_dim=64, depth=8, num_heads=4, mlp_ratio=2.0, class_token=False,
        global_pool="avg",
    ),
}  # fmt: skip


def _all_models() -> dict[str, ViTConfig]:
    models: dict[str, dict[str, Any]] = {}
    for size, patches in _PATCHES.items():
        for patch in patches:
            for image in (224, 384):
                if image % patch == 0:
                    models[f"vit_{size}_patch{patch}_{image}"] = dict(
                        patch_size=patch, image_size=image, **_SIZES[size]
                    )
    for size, image in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384)):
        for kind, distilled in (("", False), ("_distilled", True)):
            name = f"deit_{size}{kind}_patch16_{image}"
            models[name] = dict(image_size=image, distilled=distilled, **_SIZES[size])
    for name, settings in _HYBRIDS.items():
        models |= {f"{name}_{image}": dict(image_size=image, **settings) for image in (224, 384)}
    for name, settings in _SMALL_IMAGES.items():
        models[name] = {"image_size": 32, "num_classes": 10, **settings}
    return {name: ViTConfig(**settings) for name, settings in models.items()}


_MODELS = _all_models()


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows.

    Args:
        pattern: as for files: "*tiny*" stands for all names with "tiny" in them, "?" for any character.
    """
    return fnmatch.filter(_MODELS, pattern)


def model_config(name: str, **overrides: Any) -> ViTConfig:
    """The configuration of a model.

    Args:
        name: one of `list_models()`.
        overrides: settings to replace, by their names in `ViTConfig`.

    Raises:
        ValueError: an unknown name (a close one is suggested), or settings that do not fit together.
        TypeError: an unknown setting.
    """
    if name not in _MODELS:
        hint = nearest(name, _MODELS) or "; tinyvit.list_models() lists them all"
        raise ValueError(f"unknown model {name!r}{hint}")
    try:
        return _MODELS[name].replace(**overrides)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def create_model(name: str, *, seed: int = 0, **overrides: Any) -> VisionTransformer:
    """A new model in training mode, with the paper's initial weights.

    Args:
        name: one of `list_models()`.
        seed: the initial weights are drawn from it.
        overrides: settings to replace, e.g. num_classes=10, image_size=32, patch_size=4, drop_path=0.1.

    Raises:
        ValueError: an unknown name, or settings that do not fit together.
        TypeError: an unknown setting.
    """
    config = model_config(name, **overrides)
    with random.scope(seed):
        return VisionTransformer(config)
