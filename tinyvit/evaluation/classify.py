"""What a model makes of single images: their classes, and the features before its head."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyvit.data import Augment, DataError, Split
from tinyvit.data.image import open_rgb, upright_rgb
from tinyvit.data.splits import in_threads
from tinyvit.evaluation.metrics import BATCH_SIZE, EvaluationError, outputs_of
from tinyvit.execution.inference import predictions
from tinyvit.files.bar import bar
from tinyvit.kernels import jit
from tinyvit.models.inspection import Features
from tinyvit.models.vit import VisionTransformer

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


def classify(
    model: VisionTransformer, images: ImageLike | Sequence[ImageLike], top: int = 5, precision: str = "fp32"
) -> list[Any]:
    """Names what images show.

    Args:
        model: from `load_model`, so that it has the names of its classes and its preprocessing.
        images: a path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a list of these.
        top: how many classes to give.
        precision: as for `predict`.

    Returns:
        (class name, probability) pairs, the likeliest first; for a list of images a list of such lists.

    Raises:
        EvaluationError: the model has no head, class names or preprocessing, or its outputs are not finite.
        DataError: an image cannot be read.
        TypeError: no image; prepared arrays are for `predict`.
    """
    if not model.class_names:
        raise EvaluationError("classify needs a model with class names, as load_model gives it; got one without")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    several = isinstance(images, list | tuple)
    given: Any = images if several else [images]
    outputs = run_on_images(model, given, precision)
    named = [likeliest(model.class_names, p, top) for p in outputs.probabilities]
    return named if several else named[0]


def likeliest(names: Sequence[str], probabilities: np.ndarray, top: int) -> list[tuple[str, float]]:
    """The `top` likeliest classes with their probabilities; among equal ones the lower class comes first."""
    return [(names[k], float(probabilities[k])) for k in (-probabilities).argsort(kind="stable")[:top]]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A model's features (N, D) float32 and logits (N, num_classes) float64 of N images.

    `unreadable` are the positions of images that were left out.
    """

    features: np.ndarray
    logits: np.ndarray
    unreadable: frozenset[int] = frozenset()

    @property
    def probabilities(self) -> np.ndarray:
        """Of the classes, (N, num_classes) float64."""
        exp = np.exp(self.logits - self.logits.max(axis=1, keepdims=True, initial=-np.inf))
        return exp / exp.sum(axis=1, keepdims=True)


def run_on_images(
    model: VisionTransformer,
    images: Sequence[ImageLike],
    precision: str = "fp32",
    skip_corrupt: bool = False,
    done: Callable[[int], object] = lambda count: None,
) -> Outputs:
    """The features and logits of images, prepared as the model's preprocessing says; errors as `classify`.

    With `skip_corrupt` images that cannot be read are left out. `done` is called with numbers of images that are done.
    """
    unreadable: set[int] = set()

    def prepared(position: int) -> np.ndarray | None:
        try:
            return model_input(model, rgb(images[position]))
        except DataError:
            if not skip_corrupt:
                raise
            unreadable.add(position)
            done(1)
            return None

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(images), BATCH_SIZE):
            found = in_threads(prepared, range(start, min(start + BATCH_SIZE, len(images))))
            if readable := [x for x in found if x is not None]:
                yield np.concatenate(readable)

    with jit.worth_it_for(len(images)):
        outputs = list(predictions(Features(model, logits=True), batches(), precision=precision, done=done))
    none = np.zeros((0, model.config.embed_dim + model.config.num_classes), np.float32)
    return dataclasses.replace(_separated(model, np.concatenate(outputs or [none])), unreadable=frozenset(unreadable))


def run_on_split(model: VisionTransformer, split: Split, transform: Augment) -> Outputs:
    """The features and logits of all images of a split; `transform` is mostly `Augment(mean, std)`.

    Raises EvaluationError where an output is not finite, DataError where an image cannot be read.
    """
    with bar("images", len(split)) as done:
        outputs = list(outputs_of(Features(model, logits=True), split, transform, done=done))
    return _separated(model, np.concatenate(outputs))


def _separated(model: VisionTransformer, output: np.ndarray) -> Outputs:
    """Features and logits side by side, (N, D + num_classes)."""
    if not np.all(np.isfinite(output)):
        raise EvaluationError("the model's outputs are not finite")
    width = output.shape[1] - model.config.num_classes
    return Outputs(output[:, :width].astype(np.float32), output[:, width:].astype(np.float64))


def rgb(image: ImageLike) -> Image.Image:
    """An upright RGB image from a path, a PIL image or a uint8 array. Raises DataError, TypeError."""
    if isinstance(image, str | os.PathLike):
        return open_rgb(image)
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.shape[2:] in ((), (3,), (4,))
        and image.ndim > 1
    ):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        given = f"{image.dtype} array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(
            f"expected a path, a PIL image or a uint8 array (H, W, 3), got {given}; prepared arrays are for predict"
        )
    return upright_rgb(image)


def model_input(model: VisionTransformer, image: Image.Image) -> np.ndarray:
    """An RGB image as the model takes it: (1, C, H, W) float32."""
    if model.preprocessing is None:
        raise EvaluationError("the model has no preprocessing: open it with load_model, or prepare arrays for predict")
    return model.preprocessing(image, model.config.image_size)[None]


def image_paths(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths, with each directory replaced by the images in and below it, by name; and the other files in those.

    Raises EvaluationError.
    """
    from tinyvit.data.sources.image_folder import images_in

    found, others = list[str](), list[str]()
    for path in paths:
        if not os.path.lexists(path):
            raise EvaluationError(f"cannot read image {path}: no such file or directory")
        inside, passed = images_in(Path(path)) if os.path.isdir(path) else ([path], [])
        if not inside:
            raise EvaluationError(f"{path} holds no images")
        found += inside
        others += passed
    return found, others
