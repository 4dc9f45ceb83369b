"""A run's curves as plain text in a terminal, drawn again and again: `tinyvit watch`."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.files.text import printable
from tinyvit.training.config import TrainConfig
from tinyvit.training.display import clock
from tinyvit.training.progress import Progress
from tinyvit.training.run_directory import METRICS, RunDirectory, curve_labels
from tinyvit.training.trainer import epoch_line
from tinyvit.viz import svg

EVERY = 2.0  # seconds between two drawings
BESIDE = 100  # columns of a terminal in which two charts stand side by side
CLEAR = "\x1b[H\x1b[2J"


def watch(path: Path) -> None:
    """Draw until the run is finished or Ctrl-C comes; only once where standard output is no terminal.

    In a terminal a run may also begin meanwhile.

    Raises:
        CheckpointError: its files are damaged; without a terminal also where there is no run.
    """
    directory = RunDirectory(path)
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    colours = live and not os.environ.get("NO_COLOR")
    try:
        while True:
            if live and not path.is_file() and not directory.last.exists():
                text, finished = printable(f"waiting for a run to begin in {path}"), False
            else:
                text, finished = frame(directory, shutil.get_terminal_size(), colours)
            print(f"{CLEAR}{text}" if live else text, flush=True)
            if finished or not live:
                return
            time.sleep(EVERY)
    except KeyboardInterrupt:
        return


def frame(directory: RunDirectory, size: os.terminal_size, colours: bool) -> tuple[str, bool]:
    """What is shown of a run in a terminal of this size, and whether the run is finished."""
    record, progress = directory.read_record(), Progress.read(directory.last)
    rows, finished = progress.history, progress.finished
    title, _ = curve_labels(TrainConfig(**record.options), record.data_name)
    if not rows:
        return printable(f"{title}: no epoch has ended yet"), finished
    ago = clock(max(0.0, time.time() - (directory.path / METRICS).stat().st_mtime))
    state = "finished" if finished else f"the last epoch ended {ago} ago"
    beside = size.columns >= BESIDE
    width, height = (size.columns // 2 - 1, size.lines - 7) if beside else (size.columns - 1, (size.lines - 10) // 2)
    loss, accuracy = (chart(rows, what, width, max(5, min(height, 16)), colours) for what in ("loss", "accuracy"))
    charts = [f"{a}  {b}" for a, b in zip(loss, accuracy, strict=True)] if beside else [*loss, "", *accuracy]
    ended = [printable(f"{title}, {state}"), "", *charts, "", epoch_line(rows[-1], record.length)]
    return "\n".join(line.rstrip() for line in ended), finished


def chart(rows: Sequence[dict[str, Any]], what: str, width: int, height: int, colours: bool) -> list[str]:
    """Training and validation by epoch as lines of `width` columns, the curves `height` lines high.

    Args:
        rows: at least one of metrics.jsonl.
        what: "loss" or "accuracy".
    """
    parts = {"training": ".", "validation": "o"}
    colour = {"training": "34", "validation": "38;5;208"}  # blue and orange, as in all charts
    shown = {part: f"\x1b[{colour[part]}m{mark}\x1b[0m" if colours else mark for part, mark in parts.items()}
    epochs = [row["epoch"] for row in rows]
    curves = {part: [row[f"{key}_{what}"] for row in rows] for part, key in zip(parts, ("train", "val"), strict=True)}
    low, high = svg.around(
        [v for values in curves.values() for v in values], 0.2, (0, 1 if what == "accuracy" else np.inf)
    )

    def line(value: Any) -> Any:
        return np.clip(np.rint((high - value) / (high - low) * (height - 1)), 0, height - 1).astype(int)

    ticks = svg.ticks(low, high, height // 2 + 1)
    texts = svg.tick_labels(ticks, "%" if what == "accuracy" else "")
    labels = {int(line(t)): text for t, text in zip(ticks, texts, strict=True)}
    left = max(map(len, labels.values()))
    across = max(8, width - left - 2)
    cells = [[" "] * across for _ in range(height)]
    places = np.linspace(0, 1, 8 * across) if len(rows) > 1 else np.array([0.5])
    for part, values in curves.items():
        ys = np.interp(epochs[0] + places * (epochs[-1] - epochs[0]), epochs, values)
        for x, y in zip((places * (across - 1)).round().astype(int), line(ys), strict=True):
            cells[y][x] = shown[part]
    text = f"{'':{left}} {what}: {', '.join(f'{mark} {part}' for part, mark in parts.items())}".ljust(width)
    legend = list(text)
    for part, mark in parts.items():
        legend[text.index(f"{mark} {part}")] = shown[part]
    drawn = [f"{labels.get(i, ''):>{left}} {'+' if i in labels else '|'}{''.join(row)}" for i, row in enumerate(cells)]
    ends = f"{epochs[0]}{epochs[-1]:>{across - len(str(epochs[0]))}}" if len(rows) > 1 else f"{epochs[0]:^{across}}"
    return ["".join(legend), *drawn, f"{'':{left}}  {ends}"]
