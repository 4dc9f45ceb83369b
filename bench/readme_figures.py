"""The figure on top of README.md: curves of a run on the built-in data set, and where its model looks.

    tinyvit train --out runs/shapes && python bench/readme_figures.py runs/shapes .github/shapes.png

Needs matplotlib (pip install ".[plot]").
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

import tinyvit
from tinyvit import data
from tinyvit.evaluation import heatmap
from tinyvit.models import inspection

EXAMPLES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory trained on shapes")
    parser.add_argument("png", type=Path, help="the file to write")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9.6, 3.1), layout="constrained", facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.75))
    draw_curves(left.subplots(), rows)
    draw_attention(right, tinyvit.load_model(args.run))
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=110)
    Image.open(pixels).convert("RGB").quantize(256).save(args.png, optimize=True)


def draw_curves(axes, rows: list[dict]) -> None:
    """Training and validation accuracy over the epochs."""
    epochs = [row["epoch"] for row in rows]
    for part, label in (("train", "training"), ("val", "validation")):
        axes.plot(epochs, [100 * row[f"{part}_accuracy"] for row in rows], marker="o", markersize=4, label=label)
    axes.set_title("tinyvit train, on the built-in shapes", fontsize=10)
    axes.set(xlabel="epoch", ylabel="accuracy, %")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)


def draw_attention(figure, model: tinyvit.VisionTransformer) -> None:
    """Test images of different classes above their attention rollout, with what the model says."""
    test = data.load_data("shapes").test
    chosen = np.array([np.flatnonzero(test.labels == label)[2] for label in range(EXAMPLES)])
    images = test.read(chosen)
    mean, std = (
        np.reshape(x, (3, 1, 1)).astype(np.float32) for x in (model.preprocessing.mean, model.preprocessing.std)
    )
    inputs = (images.astype(np.float32) / 255 - mean) / std
    logits = tinyvit.predict(model, inputs)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    heats = inspection.rollout(model, inputs)
    figure.suptitle("test images, and where the model looks (attention rollout)", fontsize=10)
    grid = figure.subplots(2, EXAMPLES)
    for i, (above, below) in enumerate(grid.T):
        image = Image.fromarray(images[i].transpose(1, 2, 0))
        height, width = images.shape[2:]
        above.imshow(image, interpolation="nearest")
        below.imshow(heatmap.draw(image, heats[i], ((0, height), (0, width))))
        best = int(shares[i].argmax())
        below.set_xlabel(f"{model.class_names[best]} {shares[i, best]:.0%}")
        for axes in (above, below):
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set_visible(False)


if __name__ == "__main__":
    main()
