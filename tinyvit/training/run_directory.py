"""The run directory: config.json, metrics.jsonl, curves.png, and what may be written where."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit._version import __version__
from tinyvit.checkpoints.checkpoint import LAST, CheckpointError
from tinyvit.files.atomic import atomic_write, write_text
from tinyvit.training.config import FIELDS, TrainConfig, UsageError, check_same, read_value

if TYPE_CHECKING:
    from tinyvit.data import Data

CONFIG, METRICS, CURVES = "config.json", "metrics.jsonl", "curves.png"
DRAW_EVERY = 10.0  # seconds, at least: drawing takes a quarter of one


def check_unused(out: Path) -> None:
    """Refuse to start a run where something is already. Raises UsageError."""
    if (out / LAST).exists():
        raise UsageError(f"{out} holds a run: go on with it by --resume, or choose another --out")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: choose another --out")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no run: choose another --out")


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"tinyvit": __version__, "numpy": np.__version__, "python": platform.python_version()}


def write_config(out: Path, config: dict[str, Any]) -> None:
    write_text(out / CONFIG, json.dumps(config, indent=2) + "\n")


def read_config(out: Path) -> dict[str, Any]:
    """The config.json of a run that can be resumed. Raises CheckpointError."""
    if not (out / LAST).is_file():
        raise CheckpointError(f"{out}: there is no {LAST} to resume from")
    try:
        config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{out / CONFIG}: {error.strerror or error}") from None
    except ValueError:
        raise CheckpointError(f"{out / CONFIG} is damaged: not JSON") from None
    try:
        if unknown := sorted(set(config["options"]) - set(FIELDS)):
            raise CheckpointError(f"{out / CONFIG}: this version of tinyvit has no option {', '.join(unknown)}")
        options = {
            name: value
            if value is None and FIELDS[name].default is None
            else read_value(out / CONFIG, name, name, value)
            for name, value in config["options"].items()
        }
        config["options"] = dataclasses.asdict(TrainConfig(**options))
        plan = {name: index(config["plan"][name]) for name in ("total_steps", "steps_per_epoch", "warmup_steps")}
        if plan["steps_per_epoch"] < 1 or not 0 <= plan["warmup_steps"] < plan["total_steps"]:
            raise TypeError
        config["plan"] = plan
        config["data"]["name"], config["data"]["fingerprint"]
    except UsageError as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{out / CONFIG} is damaged: it describes no run") from None
    return config


def resumed_options(out: Path, config: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The options of the run at `out`, with those of `given` that may change. Raises UsageError for the others."""
    check_same(config["options"], given, out)
    return TrainConfig(**{**config["options"], **given, "out": str(out)})


def check_same_data(out: Path, config: dict[str, Any], data: Data) -> None:
    """Refuse to go on with other images than the run was started with. Raises UsageError."""
    recorded = config["data"]
    if recorded["fingerprint"] != data.fingerprint:
        other = f"{data.name}, which holds other images" if data.name == recorded["name"] else data.name
        raise UsageError(f"{out} was started with the data set {recorded['name']}, not {other}: choose another --out")


def write_metrics(out: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object per epoch and line; the file is replaced as a whole, so no line is ever torn."""
    write_text(out / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def curves_png(rows: list[dict[str, Any]], title: str) -> bytes | None:
    """Loss and accuracy over the epochs as a PNG image, or None when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(title)
    epochs = [row["epoch"] for row in rows]
    panels = (("loss", 1, "cross-entropy"), ("accuracy", 100, "accuracy, %"))
    for axes, (what, scale, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for part, label in (("train", "training"), ("val", "validation")):
            values = [scale * row[f"{part}_{what}"] for row in rows]
            axes.plot(epochs, values, label=label, marker="o" if len(rows) < 30 else None, markersize=4)
        axes.set(title=what.capitalize(), xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def write_curves(out: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw curves.png, where matplotlib is installed."""
    if png := curves_png(rows, title):
        with atomic_write(out / CURVES) as beside:
            beside.write_bytes(png)
