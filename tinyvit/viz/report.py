"""Everything about a run or a checkpoint on one page: `tinyvit report`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tinyvit.checkpoints.checkpoint import LAST, Checkpoint
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.data import Augment, DataError, Split
from tinyvit.data.augment import normalise
from tinyvit.data.splits import left_out
from tinyvit.evaluation.classify import Outputs, run_on_split
from tinyvit.evaluation.heatmap import beside
from tinyvit.evaluation.metrics import check_head, confusion_counts, data_for, drawn_otherwise, labels_for, ranks
from tinyvit.files.atomic import check_output, write_text
from tinyvit.models import inspection
from tinyvit.models.summary import short, summarise
from tinyvit.models.vit import VisionTransformer
from tinyvit.viz import figures, measures
from tinyvit.viz.page import facts, page, table
from tinyvit.viz.runs import Run

SHOWN = 16  # images on a sheet
ROLLOUTS, HEADS = 6, 3  # images with attention rollout, and with the attention of each head
LARGEST = 384  # pixels: the side of images on the page
MAPPED = 500  # images on the map of features
MOST_WEIGHTS = 1 << 25  # attention weights of a block that are held at a time

Section = tuple[str, str, str]  # heading, explanation, HTML


def write_report(
    path: str, source: str | None, out: str | Path | None, device: str = "cpu", skip_corrupt: bool = False
) -> Path:
    """Write the report on the run or checkpoint at `path`, and return where it is.

    Args:
        source: the data set whose test images are measured; a run's own if None, none for a checkpoint.
        out: the page; report.html in the run, or NAME-report.html beside the checkpoint, if None.
        device: as for `nn.Module.to`.
        skip_corrupt: leave out images that cannot be read; the page says how many.

    Raises:
        CheckpointError, DataError, EvaluationError, UsageError, OSError: each with a message of one line.
    """
    target = Path(out) if out else _usual_place(Path(path))
    check_output("--out", target)
    checkpoint = open_checkpoint(path)
    check_head(checkpoint)
    run = Run.read(path) if (Path(path) / LAST).exists() else None
    model = checkpoint.build(copy=False).to(device)
    sections = list(_about(checkpoint, run))
    measured = source or (run.record.options["data"] if run is not None else None)
    if measured:
        try:
            sections += _measured(checkpoint, model, measured, skip_corrupt)
        except DataError as error:
            if source:
                raise
            why = f"run's data set cannot be read: {error}"
            warnings.warn(f"the {why}; name another with --data DIR", stacklevel=2)
            sections.append(("Images", f"The {why}. Name another with --data DIR.", ""))
    sections += _weights(model)
    name = checkpoint.path.name if run is None else run.name
    write_text(target, page(f"{name}: {summarise(checkpoint.config).parameters / 1e6:.2f} M parameters", sections))
    return target


def _usual_place(path: Path) -> Path:
    return path / "report.html" if path.is_dir() else path.with_name(f"{path.stem}-report.html")


def _about(checkpoint: Checkpoint, run: Run | None) -> Iterator[Section]:
    """What is known without data."""
    if run is None:
        model = summarise(checkpoint.config)
        of_model = {"parameters": f"{model.parameters:,}", "FLOPs an image": short(model.flops)}
        yield "Model", "A checkpoint, without a record of its training.", facts({"": of_model})
        return
    yield "Run", "What was trained on what, how long and how fast.", facts({"": run.facts()})
    yield "Settings", "The options of the run that are not none, zero or off.", facts({"": run.settings_in_effect})
    if run.rows:
        yield (
            "Curves",
            "By epoch. The training loss includes label smoothing and mixing of images where they are used; "
            "validation is measured without them.",
            f'<div class="row">{figures.curve_charts({"": run.rows})}</div>',
        )


def _measured(checkpoint: Checkpoint, model: VisionTransformer, source: str, skip_corrupt: bool) -> Iterator[Section]:
    """What the model does with the test images of a data set."""
    data = data_for(checkpoint, source, skip_corrupt)
    split, names = data.test, checkpoint.class_names
    labels = labels_for(checkpoint, split.labels, data.class_names)
    outputs = run_on_split(model, split, Augment(*checkpoint.preprocessing.statistics))
    p, predicted = outputs.probabilities, outputs.probabilities.argmax(axis=1)
    hit, confidence = predicted == labels, p.max(axis=1)
    what = f"{len(labels)} {data.test_name} images of {data.name}"
    doubts = [drawn_otherwise(checkpoint, data), left_out(split.skipped) if split.skipped else ""]
    counts = confusion_counts(labels, predicted, len(names))
    top5 = {"top-5": f"{(ranks(p, labels) < 5).mean():.2%}"} if len(names) > 5 else {}
    calibration = figures.calibration(p, labels)
    error = measures.calibration_error(calibration.data)
    yield (
        "Accuracy",
        f"Of {what}{''.join(f'; {doubt}' for doubt in doubts if doubt)}.",
        facts({"": {"top-1": f"{hit.mean():.2%}", **top5, "expected calibration error": f"{error:.2%}"}}),
    )
    yield "Classes", "A click on a heading sorts.", _class_table(counts, names)
    yield (
        "Confusion",
        "Rows are the true classes, columns what they were taken for"
        + (": from dark, none of a class's images, to light, all." if len(names) > figures.MOST_NUMBERS else "."),
        f'<div class="wide">{figures.confusion(labels, predicted, names).html}</div>{_most_confused(counts, names)}',
    )
    yield (
        "Calibration",
        "How often predictions of a confidence are right: on the dashed line they are as often right as they are "
        "confident. Above each bar is the number of images in it: the height of one of few says little.",
        calibration.html,
    )

    def sheet(places: np.ndarray) -> str:
        captions = [
            f"{figures.svg.label(names[predicted[i]])} {confidence[i]:.1%}"
            + ("" if hit[i] else f"<br>is {figures.svg.label(names[labels[i]])}")
            for i in places
        ]
        return figures.sheet(images_of(split.read(places)), captions)

    wrong, right = np.flatnonzero(~hit), np.flatnonzero(hit)
    if len(wrong):
        most_certain = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
        yield "Confident mistakes", "Wrong, and the most certain.", sheet(most_certain)
    if len(right):
        yield "Uncertain hits", "Right, and the least certain.", sheet(right[np.argsort(confidence[right])][:SHOWN])
    yield from _attention(model, checkpoint, split)
    yield _feature_map(outputs, labels, names)


def images_of(pixels: np.ndarray) -> list[Image.Image]:
    """Images (N, C, H, W) uint8 as the model sees them, but no larger than LARGEST."""
    shown = np.asarray(pixels).transpose(0, 2, 3, 1)
    images = [Image.fromarray(x if x.shape[2] == 3 else x[:, :, 0]).convert("RGB") for x in shown]
    for image in images:
        image.thumbnail((LARGEST, LARGEST))
    return images


def _class_table(counts: np.ndarray, names: tuple[str, ...]) -> str:
    rows = []
    for k, name in enumerate(names):
        support, taken, hits = int(counts[k].sum()), int(counts[:, k].sum()), int(counts[k, k])
        rows.append((name, hits / taken if taken else None, hits / support if support else None, support))
    return table(("class", "precision", "recall", "images"), rows)


def _most_confused(counts: np.ndarray, names: tuple[str, ...]) -> str:
    """The pairs that are confused most often, where the matrix is too large to be read."""
    if len(names) <= figures.MOST_NUMBERS:
        return ""
    wrong = counts * (1 - np.eye(len(names), dtype=np.int64))
    pairs = zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:20], wrong.shape), strict=True)
    return table(
        ("true", "predicted", "images"), [(names[i], names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]
    )


def _attention(model: VisionTransformer, checkpoint: Checkpoint, split: Split) -> Iterator[Section]:
    """Attention on images from all over the split. Nothing for a model whose attention is not known."""
    config = model.config
    places = np.unique(np.linspace(0, len(split) - 1, ROLLOUTS).astype(int))
    pixels = np.asarray(split.read(places))
    images, inputs = images_of(pixels), normalise(pixels, *checkpoint.preprocessing.statistics)
    at_a_time = max(1, MOST_WEIGHTS // (config.num_heads * config.num_tokens**2))
    heats = np.concatenate(
        [inspection.rollout(model, inputs[i : i + at_a_time]) for i in range(0, len(inputs), at_a_time)]
    )
    pictures = [
        beside(image, heat, ((0.0, image.height), (0.0, image.width)))
        for image, heat in zip(images, heats, strict=True)
    ]
    shown = "".join(
        f"<div>{figures.embedded(p, 'an image, and attention rollout over it', photo=True)}</div>" for p in pictures
    )
    yield (
        "Attention rollout",
        "How much the output draws on each patch, over all blocks. The bar gives the shares of the most and the least.",
        f'<div class="row">{shown}</div>',
    )
    heads = measures.head_attention(model, inputs[: min(HEADS, at_a_time)])
    by_head = (
        f'<div><figure class="photo">{figures.embedded(image, "an image", photo=True)}</figure>'
        f'<div class="wide">{figures.heads_picture(heads[:, i]).html}</div></div>'
        for i, image in enumerate(images[: heads.shape[1]])
    )
    yield (
        "Heads",
        "Where each head (columns) of each block (rows) looks; each map goes from dark, its least, to light, its most.",
        f'<div class="row">{"".join(by_head)}</div>',
    )
    many = split.read(np.unique(np.linspace(0, len(split) - 1, min(32, at_a_time)).astype(int)))
    distance = measures.attention_distance(model, normalise(np.asarray(many), *checkpoint.preprocessing.statistics))
    yield (
        "Attention distance",
        f"How far each head looks, in pixels, as a mean over {len(many)} images. Small values are local heads. "
        "The heads of a block stand side by side, in their order.",
        figures.distance_chart(distance),
    )


def _feature_map(outputs: Outputs, labels: np.ndarray, names: tuple[str, ...]) -> Section:
    places = np.unique(np.linspace(0, len(labels) - 1, MAPPED).astype(int))
    figure = figures.features(outputs.features[places], labels[places], names)
    return (
        "Features",
        f"The features before the head of {len(places)} images on their two principal components.",
        figure.html,
    )


def _weights(model: VisionTransformer) -> Iterator[Section]:
    """What the weights alone show, where it makes sense for the model."""
    if model.config.feature_chans == model.config.in_chans:
        about = "The principal components of the filters that embed the patches (figure 7 of the ViT paper)."
        yield "Patch filters", about, f'<div class="wide">{figures.filters(model).html}</div>'
    if model.pos_embed is not None:
        about = "For each patch, how alike all position embeddings are to its own: from -1, dark, to 1, light."
        yield "Positions", about, f'<div class="wide">{figures.position_similarity(model).html}</div>'
