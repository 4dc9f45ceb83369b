"""How far a run has come: everything besides arrays that changes while it trains."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.native_file import read_metadata
from tinyvit.evaluation.metrics import Scores
from tinyvit.files.fields import Check, boolean, integer, list_of, number, record

_COUNT, _SECONDS, _SHARE = integer(0, 10**15), number(0, 1e12), number(0, 1)
_LOSS = number(-1e30, 1e30)  # class weights can make a mean of losses as large as they like, but not infinite
ROW = record(
    {
        "epoch": integer(1, 10**15),
        "step": integer(1, 10**15),
        "train_loss": _LOSS,
        "train_accuracy": _SHARE,
        "val_loss": _LOSS,
        "val_accuracy": _SHARE,
        "val_top5": _SHARE,
        "lr": number(0, 1e30),
        "images_per_second": number(0, 1e15),
        "seconds": _SECONDS,
    }
)


def _rows(values: Any) -> list[dict[str, Any]]:
    return list(list_of(ROW, 0, 10**6)(values))


def _field(default: Any, check: Check) -> Any:
    """A field of Progress with its default, and its type and range in a file."""
    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
        step, epoch: training steps and whole epochs that are done.
        batch: batches that are done of the present epoch.
        seen, correct, loss_sum, epoch_seconds: sums over those batches; the seconds are those of the steps alone.
        seconds: duration of the run so far, with evaluations, and with features computed before the first step.
        best_accuracy, best_loss, best_epoch: the best validation result so far.
        finished: whether the run is at its end.
        history: one row for each epoch, as in metrics.jsonl.
    """

    step: int = _field(0, _COUNT)
    epoch: int = _field(0, _COUNT)
    batch: int = _field(0, _COUNT)
    seen: int = _field(0, _COUNT)
    correct: int = _field(0, _COUNT)
    loss_sum: float = _field(0.0, _LOSS)
    epoch_seconds: float = _field(0.0, _SECONDS)
    seconds: float = _field(0.0, _SECONDS)
    best_accuracy: float = _field(-1.0, number(-1, 1))
    best_loss: float = _field(0.0, _LOSS)
    best_epoch: int = _field(0, _COUNT)
    finished: bool = _field(False, boolean)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list, metadata={"check": _rows})

    @classmethod
    def read(cls, path: Path) -> Progress:
        """The progress in a last.safetensors.

        Raises:
            CheckpointError: the file cannot be read, or a value is missing, of a wrong type or out of range.
        """
        try:
            checks = record({field.name: field.metadata["check"] for field in dataclasses.fields(cls)})
            progress = cls(**checks(read_metadata(path).get("progress")))
            progress._check_sums()
        except ValueError as error:
            raise CheckpointError(f"{path}: the progress of its run is damaged: {error}") from None
        return progress

    def _check_sums(self) -> None:
        if [row["epoch"] for row in self.history] != list(range(1, self.epoch + 1)):
            raise ValueError(f"its history does not list the epochs 1 to {self.epoch}")
        if not self.correct <= self.seen or self.batch > self.step or self.best_epoch > self.epoch:
            raise ValueError("its counts contradict each other")

    @property
    def mean_loss(self) -> float:
        """The mean training loss of the present epoch."""
        return self.loss_sum / self.seen if self.seen else math.nan

    @property
    def accuracy(self) -> float:
        """The training accuracy of the present epoch, in 0..1."""
        return self.correct / self.seen if self.seen else math.nan

    @property
    def images_per_second(self) -> float:
        """The speed of the present epoch's steps."""
        return self.seen / self.epoch_seconds if self.epoch_seconds else math.nan

    def improved_by(self, scores: Scores) -> bool:
        """Whether validation scores beat all earlier ones; the loss decides between equal accuracies."""
        assert scores.loss is not None
        return (scores.accuracy, -scores.loss) > (self.best_accuracy, -self.best_loss)

    def end_epoch(self, scores: Scores, lr: float, seconds: float) -> dict[str, Any]:
        """Close the present epoch and return its row of metrics.jsonl.

        Args:
            scores: the validation scores.
            lr: the learning rate of the epoch's last step.
            seconds: how long the validation took.
        """
        self.seconds += seconds
        self.epoch += 1
        if self.improved_by(scores):
            assert scores.loss is not None
            self.best_accuracy, self.best_loss, self.best_epoch = scores.accuracy, scores.loss, self.epoch
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": self.mean_loss,
            "train_accuracy": self.accuracy,
            "val_loss": scores.loss,
            "val_accuracy": scores.accuracy,
            "val_top5": scores.top5,
            "lr": lr,
            "images_per_second": self.images_per_second,
            "seconds": self.seconds,
        }
        self.history.append(row)
        self.batch, self.seen, self.correct, self.loss_sum, self.epoch_seconds = 0, 0, 0, 0.0, 0.0
        return row
