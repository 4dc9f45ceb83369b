"""The pictures, one by one. Each is a `Figure`: an array, and a picture of it that a notebook shows by itself."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinyvit.evaluation.classify import ImageLike, likeliest, model_input, rgb, run_on_images
from tinyvit.evaluation.heatmap import coloured, grid, rollout_beside
from tinyvit.evaluation.metrics import confusion_counts
from tinyvit.models.vit import VisionTransformer
from tinyvit.viz import measures, svg
from tinyvit.viz.runs import Run

MOST_NUMBERS = 25  # classes of a confusion matrix that has its counts in it
MOST_POSITIONS = 16  # rows and columns of position embeddings that are shown
JPEG_FROM = 128  # pixels: larger images are stored as JPEG


@dataclass(frozen=True)
class Figure:
    """An array and its picture. A notebook shows the picture; NumPy's functions take the figure as its array.

    Attributes:
        data: the array; the function that made the figure says what its axes are.
        html: the picture as SVG or as an <img> that holds it.
        picture: the picture as a PIL image, None where it is vector graphics.
    """

    data: np.ndarray
    html: str
    picture: Image.Image | None = None

    def _repr_html_(self) -> str:
        return self.html

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.data, dtype=dtype, copy=copy)


# --- of a model -------------------------------------------------------------------------------------------------------


def filters(model: VisionTransformer) -> Figure:
    """The principal components of the patch embedding's filters; data and errors as `measures.filter_components`."""
    data = measures.filter_components(model)
    tiles = []
    for component in data:
        levels = 127.5 + 127.5 * component / max(np.abs(component).max(), 1e-12)
        channels = levels if component.shape[2] == 3 else levels.mean(axis=2, keepdims=True).repeat(3, axis=2)
        tile = Image.fromarray(np.rint(channels).astype(np.uint8))
        scale = math.ceil(48 / max(tile.size))
        tiles.append(tile.resize((scale * tile.width, scale * tile.height), Image.Resampling.NEAREST))
    return _raster(data, grid(tiles, 7, gap=4), "principal components of the patch embedding's filters")


def position_similarity(model: VisionTransformer) -> Figure:
    """For each patch a map of how alike all position embeddings are to its own; data as
    `measures.position_similarity`. Of large grids every so manieth patch is shown."""
    data = measures.position_similarity(model)
    steps = [math.ceil(n / MOST_POSITIONS) for n in data.shape[:2]]
    shown = data[:: steps[0], :: steps[1]]
    scale = max(1, round(48 / max(data.shape[2:])))
    tiles = [coloured(of_patch, -1, 1, scale) for row in shown for of_patch in row]
    return _raster(data, grid(tiles, shown.shape[1], gap=3), "similarity of position embeddings, from -1 to 1")


def attention_distance(model: VisionTransformer, images: ImageLike | Sequence[ImageLike]) -> Figure:
    """How far each head of each block looks, in pixels; data (depth, heads) as `measures.attention_distance`.

    Args:
        model: with preprocessing, as `load_model` gives it.
        images: one or several, as for `classify`; a hundred or so.
    """
    data = measures.attention_distance(model, _inputs(model, images))
    return Figure(data, distance_chart(data))


def distance_chart(data: np.ndarray) -> str:
    """One dot for each head (depth, heads), side by side over the number of their block."""
    axes = svg.Axes((0.5, len(data) + 0.5), (0.0, 1.05 * float(data.max())), "block", "mean distance, pixels",
                    whole_x=True)  # fmt: skip
    for block, heads in enumerate(data.tolist(), start=1):
        axes.rule(block + 0.5)
        for head, distance in enumerate(heads, start=1):
            place = block + 0.8 * ((head - 0.5) / len(heads) - 0.5)
            axes.dot(place, distance, 0, f"block {block}, head {head}: {distance:.2f} pixels")
    return axes.svg("mean attention distance of each head by block")


# --- of a model and images --------------------------------------------------------------------------------------------


def attention(model: VisionTransformer, image: ImageLike) -> Figure:
    """Where each head of each block looks; data (depth, heads, rows, columns) as `measures.head_attention`.

    In the picture a row is a block, a column a head, and each map has colours of its own from least to greatest.
    """
    return heads_picture(measures.head_attention(model, model_input(model, rgb(image)))[:, 0])


def heads_picture(data: np.ndarray) -> Figure:
    """Maps (depth, heads, rows, columns) as a grid, with the numbers of blocks and heads beside it."""
    scale = max(1, round(56 / max(data.shape[2:])))
    tiles = [coloured(head, head.min(), head.max(), scale) for block in data for head in block]
    maps, (depth, heads), left, top = grid(tiles, data.shape[1], gap=3), data.shape[:2], 60, 20
    canvas = Image.new("RGB", (left + maps.width, top + maps.height), "white")
    canvas.paste(maps, (left, top))
    text, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    text.text((left - 8, top - 5), "head", "black", font, anchor="rs")
    for i in range(heads):
        text.text((left + (i + 0.5) * maps.width / heads, top - 5), str(i + 1), "black", font, anchor="ms")
    for i in range(depth):
        text.text((left - 8, top + (i + 0.5) * maps.height / depth), f"block {i + 1}", "black", font, anchor="rm")
    return _raster(data, canvas, "attention of each head (columns) in each block (rows)")


def rollout(model: VisionTransformer, image: ImageLike) -> Figure:
    """The image beside attention rollout over it; data (rows, columns) as `inspection.rollout`."""
    data, picture = rollout_beside(model, rgb(image))
    return _raster(data, picture, "an image, and attention rollout over it", photo=True)


def predictions(model: VisionTransformer, images: ImageLike | Sequence[ImageLike], top: int = 3) -> Figure:
    """Images with their likeliest classes; data (N, num_classes), the probabilities. Errors as `classify`."""
    given = _several(images)
    data = run_on_images(model, given).probabilities
    captions = [
        "<br>".join(f"{svg.label(name)} {p:.1%}" for name, p in likeliest(model.class_names, row, top)) for row in data
    ]
    return Figure(data, sheet([rgb(image) for image in given], captions))


# --- of outputs -------------------------------------------------------------------------------------------------------


def confusion(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> Figure:
    """How often each class was taken for each; data (classes, classes), rows the true ones.

    Args:
        labels, predicted: true and predicted class numbers (N,).
        class_names: of all classes.
    """
    data = confusion_counts(np.asarray(labels), np.asarray(predicted), len(class_names))
    if len(data) <= MOST_NUMBERS:
        return Figure(data, svg.matrix("confusion matrix", data, class_names, "true", "predicted"))
    shares = data / np.maximum(data.sum(axis=1, keepdims=True), 1)
    picture = coloured(shares, 0, 1, max(1, 600 // len(data)))
    return _raster(data, picture, "confusion matrix: rows are true classes, columns predicted ones")


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> Figure:
    """A reliability diagram, the number of images above each bar.

    Its data (bins, 3) are confidence, accuracy and count as `measures.calibrate`.
    """
    data = measures.calibrate(np.asarray(probabilities), np.asarray(labels))
    x_label = f"confidence (expected calibration error {measures.calibration_error(data):.2%})"
    axes = svg.Axes((0.0, 1.0), (0.0, 1.0), x_label, "accuracy", percent=True)
    size = min(11.0, 38 / len(f"{data[:, 2].max():.0f}"))  # so that the numbers of neighbours stand apart
    for i, (confidence, accuracy, count) in enumerate(data.tolist()):
        if count:
            hint = f"{count:.0f} images, confidence {confidence:.1%}, accuracy {accuracy:.1%}"
            axes.bar(i / len(data), (i + 1) / len(data), accuracy, 0, hint)
            axes.above((i + 0.5) / len(data), f"{count:.0f}", size)
    axes.line((0, 1), (0, 1), 1, dashed=True)
    return Figure(data, axes.svg("reliability diagram"))


def features(points: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Features (N, D) on their two principal components, coloured by class; data (N, 2). Axes have no unit."""
    data = measures.project(np.asarray(points))
    (left, right), (low, high) = (svg.around(column, 1e-6) for column in data.T.tolist())
    axes = svg.Axes((left, right), (low, high), "first component", "second component")
    for (x, y), k in zip(data.tolist(), labels, strict=True):
        axes.dot(x, y, int(k), class_names[k], radius=2.5)
    few = len(class_names) <= len(svg.COLOURS)
    return Figure(data, axes.svg("features on their principal components") + (svg.legend(class_names) if few else ""))


CURVES = ("epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr")


def curves(rows: Sequence[Mapping[str, Any]] | str | os.PathLike[str]) -> Figure:
    """Loss and accuracy by epoch; data (epochs, 6): epoch, train_loss, val_loss, train_accuracy, val_accuracy, lr.

    `rows` are those of a run's metrics.jsonl, or the path of a run directory.
    """
    if isinstance(rows, str | os.PathLike):
        rows = Run.read(rows).rows
    data = np.array([[row[name] for name in CURVES] for row in rows], dtype=np.float64).reshape(-1, len(CURVES))
    return Figure(data, curve_charts({"": rows}))


def curve_charts(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], parts: Sequence[str] = ("training", "validation")
) -> str:
    """Charts of loss, accuracy and learning rate, with the curves of all runs (rows of metrics.jsonl by name)."""
    prefix = {"validation": "val", "training": "train"}

    def series(what: str) -> dict[str, tuple[list[float], list[float]]]:
        named = [
            (f"{name} {part}".strip(), rows, f"{prefix[part]}_{what}") for name, rows in runs.items() for part in parts
        ]
        return {name: ([r["epoch"] for r in rows], [r[key] for r in rows]) for name, rows, key in named}

    rates = {
        name or "learning rate": ([r["epoch"] for r in rows], [r["lr"] for r in rows]) for name, rows in runs.items()
    }
    zero = (0.0, math.inf)
    charts = (
        svg.lines("loss by epoch", series("loss"), "epoch", "cross-entropy", least_span=0.2, within=zero),
        svg.lines("accuracy by epoch", series("accuracy"), "epoch", "accuracy", least_span=0.2, within=(0, 1),
                  percent=True),
        svg.lines("learning rate by epoch", rates, "epoch", "learning rate", least_span=1e-6, within=zero),
    )  # fmt: skip
    return "".join(f"<div>{chart}</div>" for chart in charts)


# --- images in HTML ---------------------------------------------------------------------------------------------------


def sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> str:
    """Images with captions (HTML) below them, as many in a row as there is room for."""
    tiles = (
        f"<figure>{embedded(image, '', photo=True)}<figcaption>{caption}</figcaption></figure>"
        for image, caption in zip(images, captions, strict=True)
    )
    return f'<div class="sheet">{"".join(tiles)}</div>'


def embedded(image: Image.Image, name: str, *, photo: bool = False) -> str:
    """An <img> that holds the image, described by `name`; large photographs as JPEG, all else as PNG.

    The pixels of small photographs stay sharp when they are enlarged.
    """
    small = max(image.size) < JPEG_FROM
    buffer, kind = io.BytesIO(), "jpeg" if photo and not small else "png"
    image.save(buffer, kind, quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    sharp = ' style="image-rendering:pixelated"' if photo and small else ""
    return f'<img{sharp} alt="{svg.label(name)}" src="data:image/{kind};base64,{data}">'


def _raster(data: np.ndarray, picture: Image.Image, name: str, *, photo: bool = False) -> Figure:
    return Figure(data, embedded(picture, name, photo=photo), picture)


def _several(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    return images if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]


def _inputs(model: VisionTransformer, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
    return np.concatenate([model_input(model, rgb(image)) for image in _several(images)])
