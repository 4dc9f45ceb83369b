"""What `tinyvit predict` writes to files: features for nearest-neighbour search, and attention over the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyvit.errors import UsageError
from tinyvit.evaluation.classify import Outputs
from tinyvit.files.atomic import atomic_write, check_output

if TYPE_CHECKING:
    from tinyvit.checkpoints.checkpoint import Checkpoint
    from tinyvit.models.vit import VisionTransformer


def check_features_path(path: Path, checkpoint: Path) -> None:
    """Refuse a path where no .npz file of features can be, or where the model is. Raises UsageError."""
    check_output("--embed", path)
    if path.suffix.lower() != ".npz":
        raise UsageError(f"--embed {path}: expected a name that ends in .npz")
    if path.exists() and checkpoint.exists() and path.samefile(checkpoint):
        raise UsageError(f"--embed {path} would overwrite the model")


def write_features(path: Path, outputs: Outputs, images: Sequence[str], checkpoint: Checkpoint, model: str) -> None:
    """An .npz file, without pickled objects, whole or not at all.

    It holds `features` (N, D) float32 and the `paths` (N,) of their images; `model`, the path of the run or
    checkpoint that computed them, and its `class_names`.
    """
    with atomic_write(path) as beside, open(beside, "wb") as file:
        np.savez(
            file,
            features=outputs.features,
            paths=np.array(images, dtype=np.str_),
            model=np.array(model, dtype=np.str_),
            class_names=np.array(checkpoint.class_names, dtype=np.str_),
        )


def overlay_paths(directory: Path, images: Sequence[str]) -> list[Path]:
    """Where the overlay of each image goes: NAME-attention.png; for another of that name NAME-attention-2.png …

    Raises UsageError where one would take the place of an image, or where `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--attention {directory} is a file, expected a directory")
    taken: set[str] = set()  # in lower case: some file systems do not tell A from a
    paths = []
    for image in images:
        name, number = f"{Path(image).stem}-attention", 1
        while (unused := name if number == 1 else f"{name}-{number}").lower() in taken:
            number += 1
        taken.add(unused.lower())
        paths.append(directory / f"{unused}.png")
    inputs = {Path(image).resolve() for image in images}
    if lost := [path for path in paths if path.resolve() in inputs]:
        raise UsageError(f"--attention {directory} would overwrite the image {lost[0]}: choose another directory")
    return paths


def write_overlays(
    paths: Sequence[Path], images: Sequence[str], model: VisionTransformer, done: Callable[[int], object]
) -> None:
    """Each image beside its attention rollout as a PNG image, each whole or not at all; after each call `done(1)`."""
    from tinyvit.data.image import open_rgb
    from tinyvit.evaluation.heatmap import rollout_beside

    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = rollout_beside(model, open_rgb(image))[1]
        with atomic_write(path) as beside:
            drawn.save(beside, format="png")
        done(1)
