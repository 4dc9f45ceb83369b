"""The run directory: config.json, metrics.jsonl, last and best weights, curves.png."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit.checkpoints.checkpoint import BEST, LAST, CheckpointError
from tinyvit.checkpoints.native_file import save
from tinyvit.errors import UsageError
from tinyvit.files.atomic import atomic_write, write_text
from tinyvit.files.fields import integer, record, text
from tinyvit.files.reading import parse_json, read_text
from tinyvit.files.text import printable
from tinyvit.training.config import FIELDS, TrainConfig, read_value
from tinyvit.training.progress import Progress
from tinyvit.training.schedule import RunLength

CONFIG, METRICS, CURVES = "config.json", "metrics.jsonl", "curves.png"
DRAW_EVERY = 10.0  # seconds between two drawings of the curves, at least: one takes a quarter of a second

_LENGTH = {"total_steps": integer(1, 10**15), "steps_per_epoch": integer(1, 10**12), "warmup_steps": integer(0, 10**15)}
_CONFIG = record(
    {
        "plan": record(_LENGTH),
        "data": record({"name": text, "fingerprint": text}),
        "shards": integer(1, 10**6),
        "device": text,
    }
)


@dataclasses.dataclass(frozen=True)
class Record:
    """What config.json says about a run.

    Attributes:
        options: all options, complete.
        length: the number of steps.
        shards: the number of shards of a batch on a CPU.
        data_name, fingerprint: the data set.
        device: where it ran.
    """

    options: dict[str, Any]
    length: RunLength
    shards: int
    data_name: str
    fingerprint: str
    device: str


class RunDirectory:
    """The files of one run. Each is written whole or not at all, and none unless `writes`."""

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.last, self.best, self.curves = self.path / LAST, self.path / BEST, self.path / CURVES
        self._drawn = time.monotonic()

    def check_unused(self) -> None:
        """Refuse to start a run where something else is, or where nothing can be written. Raises UsageError."""
        if not self.writes:
            return
        if self.last.exists():
            raise UsageError(f"{self.path} holds a run: continue it with --resume, or choose another --out")
        nearest = next(path for path in (self.path, *self.path.absolute().parents, Path()) if os.path.lexists(path))
        if not nearest.is_dir():
            raise UsageError(f"{nearest} is no directory: choose another --out")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UsageError(f"{nearest} cannot be written to: choose another --out")
        if self.path.is_dir() and not all(self._may_replace(name) for name in os.listdir(self.path)):
            raise UsageError(f"{self.path} is not empty and holds no run: choose another --out")

    def _may_replace(self, name: str) -> bool:
        """Whether a file was left by a run that stopped before its first checkpoint."""
        if name == CONFIG:
            with contextlib.suppress(OSError, ValueError):
                return {"options", "plan"} <= parse_json(read_text(self.path / CONFIG)).keys()
            return False
        return name == METRICS or (name.startswith(".") and name.endswith((".tmp", ".rehearsal.safetensors")))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this directory meanwhile. Raises UsageError if one does.

        The lock is the operating system's and ends with the process. Systems without `fcntl` have none.
        """
        if not self.writes or importlib.util.find_spec("fcntl") is None:
            yield
            return
        import fcntl

        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{self.path}: another process is training in it: wait, or choose another --out"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(descriptor)

    def write_config(self, config: Mapping[str, Any], length: RunLength) -> None:
        """Write config.json."""
        self._write(CONFIG, json.dumps({**config, "plan": dataclasses.asdict(length)}, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            write_text(self.path / name, text)

    def save(self, path: Path, tensors: Callable[[], dict[str, np.ndarray]], description: Mapping[str, Any]) -> None:
        """Write a file of weights, such as `self.last`."""
        if self.writes:
            save(path, tensors(), description)

    def read_record(self) -> Record:
        """Read config.json.

        Raises:
            CheckpointError: there is no last.safetensors, or config.json is damaged.
            OSError: a file cannot be read.
        """
        try:
            self.last.stat()  # not exists(), which may call a file missing that must not be read
        except (FileNotFoundError, NotADirectoryError):
            if not self.path.is_dir():
                raise CheckpointError(f"{self.path}: there is no such directory") from None
            anew = "; one that stopped before its first step begins anew by its command without --resume"
            begun = anew if self._may_replace(CONFIG) else ""
            raise CheckpointError(f"{self.path} is not a run: it has no {LAST}{begun}") from None
        path = self.path / CONFIG
        try:
            content = parse_json(read_text(path))
            found = _CONFIG(content)
            length = RunLength(**found["plan"])
            if length.warmup_steps >= length.total_steps:
                raise ValueError("its warm-up is longer than the run")
            options = _read_options(path, content.get("options"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        except UsageError as error:
            raise CheckpointError(str(error)) from None
        data = found["data"]
        return Record(options, length, found["shards"], data["name"], data["fingerprint"], found["device"])

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl: one JSON object for each epoch."""
        self._write(METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def draw_curves(self, rows: list[dict[str, Any]], title: str, training_loss: str, *, now: bool = False) -> None:
        """Draw curves.png where matplotlib is installed, at most every DRAW_EVERY seconds unless `now` is true."""
        if self.writes and (now or time.monotonic() - self._drawn >= DRAW_EVERY):
            self._drawn = time.monotonic()
            if png := curves_png(rows, title, training_loss):
                with atomic_write(self.curves) as beside:
                    beside.write_bytes(png)

    def remove_leftovers(self) -> None:
        """Remove the temporary files that a killed process left."""
        for name in os.listdir(self.path) if self.writes else ():
            if name.startswith(".") and name.endswith(".tmp"):
                (self.path / name).unlink(missing_ok=True)


def plot(path: Path) -> Path:
    """Draw the curves of the run at `path` from its metrics.jsonl, and return where they are.

    Raises:
        CheckpointError: there is no run, or its files are damaged.
        UsageError: matplotlib is not installed, or no epoch has ended yet.
    """
    directory = RunDirectory(path)
    record, progress = directory.read_record(), Progress.read(directory.last)
    if not progress.history:
        raise UsageError(f"{path}: no epoch has ended yet, so there is nothing to draw")
    labels = curve_labels(TrainConfig(**record.options), record.data_name)
    directory.draw_curves(progress.history, *labels, now=True)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('curves need matplotlib: pip install "tinyvit[plot]"')
    return directory.curves


def curve_labels(options: TrainConfig, data_name: str) -> tuple[str, str]:
    """The title of a run's curves, and what its training loss includes besides the cross-entropy."""
    included = {name: getattr(options, name) for name in ("label_smoothing", "mixup", "cutmix")}
    parts = [f"{name.replace('_', ' ')} {value:g}" for name, value in included.items() if value]
    return f"{options.model} on {data_name}", ", ".join(parts)


def _read_options(path: Path, values: Any) -> dict[str, Any]:
    """The options in config.json, checked like those of a TOML file. Raises ValueError and UsageError."""
    if not isinstance(values, dict):
        raise ValueError("it has no options")
    if unknown := sorted(set(values) - set(FIELDS)):
        raise UsageError(f"{path}: this version of tinyvit has no option {', '.join(unknown)[:200]}")
    options: dict[str, Any] = {
        name: value if value is None and FIELDS[name].default is None else read_value(path, name, name, value)
        for name, value in values.items()
    }
    return dataclasses.asdict(TrainConfig(**options))


def curves_png(rows: list[dict[str, Any]], title: str, training_loss: str) -> bytes | None:
    """Loss and accuracy over the epochs as a PNG image, or None when matplotlib is not installed.

    Args:
        rows: those of metrics.jsonl.
        training_loss: what the training loss includes besides the cross-entropy, such as "label smoothing 0.1".
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    figure.suptitle(printable(title), parse_math=False)
    epochs = [row["epoch"] for row in rows]
    panels = (("loss", 1, "cross-entropy", training_loss), ("accuracy", 100, "accuracy, %", ""))
    for axes, (what, scale, unit, included) in zip(figure.subplots(1, 2), panels, strict=True):
        for part, label in (("train", f"training, with {included}" if included else "training"), ("val", "validation")):
            values = [scale * row[f"{part}_{what}"] for row in rows]
            axes.plot(epochs, values, label=label, marker="o" if len(rows) < 30 else None, markersize=4)
        axes.set(title=what.capitalize(), xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
