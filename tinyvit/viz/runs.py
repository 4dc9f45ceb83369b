"""Runs as they are reported on and compared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.models.config import ViTConfig
from tinyvit.models.summary import short, summarise
from tinyvit.training.config import flag
from tinyvit.training.display import clock
from tinyvit.training.progress import Progress
from tinyvit.training.run_directory import Record, RunDirectory

_NOTHING_AT_1 = ("layer_decay", "repeats", "accumulate")
_NOT_SETTINGS = ("out", "data", "model", "epochs", "device", "threads", "log")  # shown by themselves, or without effect


@dataclass(frozen=True)
class Run:
    """A run: what config.json records, how far it is, and the model's config."""

    name: str
    record: Record
    progress: Progress
    config: ViTConfig

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Run:
        """The run in a directory. Raises CheckpointError where there is none or its files are damaged."""
        directory = RunDirectory(path)
        record, progress = directory.read_record(), Progress.read(directory.last)
        return cls(Path(path).resolve().name, record, progress, open_checkpoint(path).config)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of metrics.jsonl."""
        return self.progress.history

    @property
    def settings(self) -> dict[str, str]:
        """The options that decide the result, as text: "none", "0", "off" and the like for those without effect."""
        options = self.record.options
        left_out = _NOT_SETTINGS if options["optimizer"] == "muon" else (*_NOT_SETTINGS, "adam_lr")
        return {flag(name): _text(value) for name, value in options.items() if name not in left_out}

    @property
    def settings_in_effect(self) -> dict[str, str]:
        """`settings` without those that are none, 0 or off."""
        off = {flag(name): "1" for name in _NOTHING_AT_1}
        return {name: v for name, v in self.settings.items() if v not in ("none", "0", "off", off.get(name))}

    def facts(self) -> dict[str, str]:
        """What was trained on what, how long, how fast and how well: text by heading."""
        model, p = summarise(self.config), self.progress
        speeds = [row["images_per_second"] for row in self.rows]
        return {
            "model": str(self.record.options["model"]),
            "data": self.record.data_name,
            "device": self.record.device,
            "parameters": f"{model.parameters:,}",
            "FLOPs an image": short(model.flops),
            "epochs": self.record.length.epochs_after(p.step).strip() + ("" if p.finished else " (not finished)"),
            "time": clock(p.seconds),
            "training images/s": f"{sum(speeds) / len(speeds):.0f}" if speeds else "none yet",
            "best accuracy": f"{p.best_accuracy:.2%} in epoch {p.best_epoch}" if p.best_epoch else "none yet",
            "last validation loss": f"{self.rows[-1]['val_loss']:.4f}" if self.rows else "none yet",
        }


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", False: "off", True: "on"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
