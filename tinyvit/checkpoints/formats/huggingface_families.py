"""The families of Transformers' models that are read and written: one description of each, for both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tinyvit.checkpoints.formats import huggingface_names as names
from tinyvit.checkpoints.formats.common import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from tinyvit.models.preprocessing import Preprocessing


class Family(NamedTuple):
    """Models of Transformers.

    Attributes:
        model_type: its name in config.json.
        names: what the weights are called.
        tower: stands before the names of weights outside the head.
        classes: for the pooling of a model, and whether it has a head, the class.
        room: our settings that it has no choice of, or not all choices, and what they may be.
        heads, act, eps: what config.json leaves out where it is usual.
        usual: how images are prepared where no file says it; None for what Transformers' processors do by themselves.
    """

    model_type: str
    names: Mapping[str, str]
    tower: str
    classes: Mapping[tuple[str, bool], str]
    room: Mapping[str, tuple[Any, ...]]
    heads: int = 12
    act: str = "gelu"
    eps: float = 1e-6
    usual: Preprocessing | None = None


PLAIN: dict[str, tuple[Any, ...]] = {
    "resnet_layers": (None,), "conv_chans": (None,), "norm": ("layer_norm",), "embed_norm": (False,),
    "proj_bias": (True,), "qk_norm": (False,), "scale_attn_norm": (False,), "scale_mlp_norm": (False,),
}  # fmt: skip
LEARNED = PLAIN | {"pos_embed": ("learn", "sincos2d"), "rope": (None,)}
BEFORE_2023 = LEARNED | {"pre_norm": (False,), "final_norm": (True,), "init_values": (None,), "swiglu": (False,)}
DINO = {"pre_norm": (False,), "final_norm": (True,), "representation_size": (None,), "distilled": (False,)}
TOWER = LEARNED | {name: DINO[name] for name in ("representation_size", "distilled")}
TOWER |= {"init_values": (None,), "swiglu": (False,), "qkv_bias": (True,), "reg_tokens": (0,)}
IMAGENET = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, crop_pct=0.875)


def classes(stem: str) -> dict[tuple[str, bool], str]:
    return {("token", False): f"{stem}Model", ("token", True): f"{stem}ForImageClassification"}


def dinov2(model_type: str, stem: str) -> Family:
    both = classes(stem) | {("avg", True): f"{stem}ForImageClassification"}
    return Family(model_type, names.DINOV2, f"{model_type}.", both, LEARNED | DINO, usual=IMAGENET)


VIT = Family("vit", names.VIT, "vit.", classes("ViT"), BEFORE_2023 | {"reg_tokens": (0,)}, eps=1e-12)
DEIT = Family(
    "deit", names.VIT, "deit.", classes("DeiT"), BEFORE_2023, eps=1e-12, usual=replace(IMAGENET, crop_mode="squash")
)
DINOV2 = dinov2("dinov2", "Dinov2")
WITH_REGISTERS = dinov2("dinov2_with_registers", "Dinov2WithRegisters")
DINOV3 = Family(
    "dinov3_vit", names.DINOV3, "", {("token", False): "DINOv3ViTModel"},
    PLAIN | DINO | {"pos_embed": ("none",), "rope": ("dinov3",)}, heads=6, eps=1e-5, usual=IMAGENET,
)  # fmt: skip
CLIP = Family(
    "clip_vision_model", names.SIGLIP, "vision_model.",
    {
        ("token", False): "CLIPVisionModel",
        ("token", True): "CLIPVisionModelWithProjection",
        ("avg", True): "CLIPForImageClassification",
    },
    TOWER, act="quick_gelu", eps=1e-5, usual=Preprocessing(CLIP_MEAN, CLIP_STD, crop_pct=1.0),
)  # fmt: skip
SIGLIP = Family(
    "siglip_vision_model", names.SIGLIP, "vision_model.",
    {
        ("map", False): "SiglipVisionModel",
        ("avg", False): "SiglipVisionModel",
        ("avg", True): "SiglipForImageClassification",
    },
    TOWER | {"class_token": (False,), "pre_norm": (False,), "final_norm": (True,)},
    act="gelu_pytorch_tanh", usual=Preprocessing((0.5,) * 3, (0.5,) * 3, crop_pct=1.0),
)  # fmt: skip
BOTH_DINOV2 = (DINOV2, WITH_REGISTERS)
SHAPE = {  # what config.json calls settings that the weights show, too
    "image_size": "image_size", "patch_size": "patch_size", "num_channels": "in_chans", "hidden_size": "embed_dim",
    "num_hidden_layers": "depth", "intermediate_size": "mlp_dim",
}  # fmt: skip
FAMILIES = {family.model_type: family for family in (VIT, DEIT, CLIP, SIGLIP, DINOV2, WITH_REGISTERS, DINOV3)}
FAMILIES |= {"vit_mae": VIT, "clip": CLIP, "siglip": SIGLIP}  # which are read, not written
