"""Transformers' preprocessor_config.json: how images are prepared."""

from __future__ import annotations

from typing import Any

from tinyvit.checkpoints.checkpoint import Checkpoint, checked_preprocessing
from tinyvit.checkpoints.formats.common import refusing, without_null
from tinyvit.checkpoints.readers.weight_files import PREPROCESSOR, WeightFiles
from tinyvit.files.fields import boolean, checked, integer, list_of, number, one_of, optional
from tinyvit.models.config import ViTConfig
from tinyvit.models.preprocessing import Preprocessing, share

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def resized_size(value: Any) -> tuple[str, int]:
    """How images are resized ("squash" or "center"), and the height, or the shorter side, that they then have."""
    pixels = integer(1, 65536)
    if isinstance(value, dict):
        found = checked(value, {"shortest_edge": optional(pixels), "height": optional(pixels)})
        if found.get("shortest_edge"):
            return "center", found["shortest_edge"]
        value = found.get("height")
    return "squash", pixels(value)


FIELDS = {
    "image_mean": list_of(number(-1e6, 1e6), 1, 1024),
    "image_std": list_of(number(-1e6, 1e6), 1, 1024),
    "do_normalize": boolean,
    "do_rescale": boolean,
    "rescale_factor": number(1e-6, 1e6),
    "size": resized_size,
    "crop_size": resized_size,
    "do_center_crop": boolean,
    "resample": one_of(*RESAMPLE),
}


def read_preprocessing(files: WeightFiles, config: ViTConfig, usual: Preprocessing | None = None) -> Preprocessing:
    """What preprocessor_config.json says; without one, `usual` or what Transformers' processors do by themselves.

    Raises CheckpointError.
    """
    if usual and not files.preprocessor and len(usual.mean) == config.in_chans:
        return usual
    with refusing(f"{files.path}: its {PREPROCESSOR} cannot be followed"):
        given = checked(without_null(files.preprocessor), FIELDS)
        mean, std = (given.get(f"image_{name}", (0.5,) * config.in_chans) for name in ("mean", "std"))
        if not given.get("do_normalize", True):
            mean, std = (0.0,) * config.in_chans, (1.0,) * config.in_chans
        # They scale pixels by rescale_factor, or not at all; we by 1 / 255.
        factor = round(255 * given.get("rescale_factor", 1 / 255), 9) if given.get("do_rescale", True) else 255.0
        mode, resized = given.get("size", ("squash", config.image_size[0]))
        crop = given.get("crop_size", (mode, resized))[1] if given.get("do_center_crop", False) else resized
        found = {
            "mean": tuple(m / factor for m in mean),
            "std": tuple(s / factor for s in std),
            "crop_pct": share(min(crop, resized), resized),
            "crop_mode": mode,
            "interpolation": RESAMPLE[given.get("resample", 2)],
        }
        return checked_preprocessing(found, config.in_chans)


def write_preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of the processors in Transformers, the one that cuts images as we do."""
    from tinyvit.data.image import usual_crop

    p, (height, width) = checkpoint.preprocessing, checkpoint.config.image_size
    crop_pct = usual_crop((height, width)) if p.crop_pct is None else p.crop_pct
    larger = [int(side / crop_pct) for side in (height, width)]
    cut = larger != [height, width]
    square = p.crop_mode == "squash"
    processor = "CLIPImageProcessor" if not square else "DeiTImageProcessor" if cut else "ViTImageProcessor"
    return {
        "image_processor_type": processor,
        "do_resize": True,
        "size": dict(zip(("height", "width"), larger, strict=True)) if square else {"shortest_edge": max(larger)},
        "do_center_crop": cut or not square,
        "crop_size": {"height": height, "width": width},
        "resample": next(number for number, name in RESAMPLE.items() if name == p.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
