"""The training loop, which can stop at any step and continue with the same bits.

A run is a function of its options, its data and its length. The order of the images, the augmentation and dropout
follow from (seed, epoch, step). All that changes from step to step is the `Progress`, the weights, their average and
the optimizer's state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from tinyvit.backend import arrays
from tinyvit.data import Data
from tinyvit.distributed.group import SLOW
from tinyvit.errors import ReportedError, Stopped
from tinyvit.evaluation.metrics import EvaluationError, Scores
from tinyvit.training.build import Parts
from tinyvit.training.config import TrainConfig
from tinyvit.training.display import Display, clock
from tinyvit.training.progress import Progress
from tinyvit.training.run_directory import RunDirectory, curve_labels
from tinyvit.training.schedule import RunLength, learning_rate
from tinyvit.training.signals import Stop
from tinyvit.training.tensorboard import Log, no_log
from tinyvit.training.time_budget import TimeBudget

READ_EVERY = 1.0  # seconds: reading a step's numbers waits for a device, and the device then waits for the next step


class TrainError(ReportedError):
    """Training that cannot go on."""


@dataclasses.dataclass
class Trainer:
    """Trains to the end of a run, and keeps its directory up to date.

    Attributes:
        options: complete ones.
        data: its validation split chooses the best epoch.
        parts: the model, its optimizer, the step and the batches.
        length: the number of steps.
        directory: where the run is written.
        display: where its lines and its bar go.
        config: what config.json says besides the length.
        description: the metadata of the weights.
        budget: corrects the length as the run goes on; None for a fixed length.
        progress: where the run is.
    """

    options: TrainConfig
    data: Data
    parts: Parts
    length: RunLength
    directory: RunDirectory
    display: Display
    config: Mapping[str, Any]
    description: Mapping[str, Any]
    budget: TimeBudget | None = None
    progress: Progress = dataclasses.field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.log: Log = no_log
        self.group = self.parts.step.group
        self.parts.step.step_index = self.progress.step
        self.pending: deque[tuple[Any, int, float]] = deque()  # results, which may lie on a device, images and rates
        self.read_every = 0.0 if arrays.on_host(self.parts.step.parameters[0].data) else READ_EVERY
        self.read_at = self.saved_at = time.monotonic()
        self.unsaved_best: dict[str, np.ndarray] | None = None
        self.epoch_end_seconds = 0.0  # in this process
        self.seconds_before = self.progress.seconds  # the first step

    @property
    def rate(self) -> Callable[[int], float]:
        """The learning rate at each step of the present length."""
        assert self.options.lr is not None
        return learning_rate(self.options.schedule, self.options.lr, self.length)

    def run(self, stop: Stop, log: Log = no_log) -> None:
        """Train to the end; `log` gets the figures of each step and epoch. Raises Stopped, TrainError, OSError."""
        self.log = log
        self.display.start(self.length.total_steps, self.progress.step)
        try:
            while not self.progress.finished:
                self.train_epoch(stop)
                self.end_epoch(stop)
        finally:
            self.display.stop()
            self.save_best()

    def train_epoch(self, stop: Stop) -> None:
        """Do the steps of the present epoch that are still to be done."""
        p, parts, rate = self.progress, self.parts, self.rate
        self.display.doing(f"epoch {p.epoch + 1}  step {p.step}/{self.length.total_steps}")
        begun = time.monotonic()
        for images, labels in parts.loader.epoch(p.epoch, first_batch=p.batch):
            if p.step >= self.length.total_steps:
                break
            parts.optimizer.lr = rate(p.step)
            parts.step(images, labels)
            self.pending.append((parts.step.result, parts.loader.batch_size, parts.optimizer.lr))
            p.step, p.batch = p.step + 1, p.batch + 1
            signum, due = self.agree(stop)  # before a GPU's results are waited for, which need all processes
            if shown := time.monotonic() - self.read_at >= self.read_every:
                self.read_results()
            begun, seconds = time.monotonic(), time.monotonic() - begun
            p.epoch_seconds += seconds
            p.seconds += seconds
            if due:
                self.correct_length()
                rate = self.rate
            if shown:
                self.display.step(p.step, p.epoch + 1, p.mean_loss, p.accuracy, p.images_per_second)
            if signum is not None:
                self.save_and_stop(signum)

    def agree(self, stop: Stop) -> tuple[int | None, bool]:
        """The signal that came to any process, and whether the length is to be corrected, which the first one says."""
        due = self.budget is not None and self.group.leads and self.budget.due_after(self.progress.step)
        told = self.group.exchange((stop(), due))
        return next((signum for signum, _ in told if signum is not None), None), told[0][1]

    def end_epoch(self, stop: Stop) -> None:
        """Evaluate, and write the epoch's results in an order that leaves a sound run wherever it is killed."""
        p, begun = self.progress, time.monotonic()
        self.read_results()
        scores = self.evaluate(stop)
        if scores is None:
            signum, _ = self.agree(stop)
            self.save_and_stop(signum or 0)  # all batches are done: a resumed run begins with the evaluation
        evaluated = time.monotonic()
        row = p.end_epoch(scores, self.parts.optimizer.lr, evaluated - begun)
        patience = self.options.patience
        given_up = patience is not None and p.epoch - p.best_epoch >= patience
        p.finished = given_up or p.step >= self.length.total_steps
        self.directory.write_metrics(p.history)
        self.log("epoch", p.step, {name: value for name, value in row.items() if name not in ("epoch", "step")})
        if p.finished or time.monotonic() - self.saved_at >= self.parts.save_every:
            self.save()
        self.directory.draw_curves(p.history, *curve_labels(self.options, self.data.name), now=p.finished)
        self.display.line(epoch_line(row, self.length))
        if given_up and p.step < self.length.total_steps:
            self.display.line(f"stopping early: {patience} epochs without a better validation accuracy")
        self.group.exchange(None, SLOW)  # the files are written
        p.seconds += time.monotonic() - evaluated
        self.epoch_end_seconds += time.monotonic() - begun

    def evaluate(self, stop: Stop) -> Scores | None:
        """Scores of the model, or of its average, on the validation split; keeps the best weights. None if stopped."""
        ema = self.parts.ema
        self.display.doing(f"epoch {self.progress.epoch + 1}  evaluating {len(self.data.validation)} validation images")
        with ema.applied() if ema is not None else contextlib.nullcontext():
            try:
                scores = self.parts.evaluate(self.data.validation, stop)
            except EvaluationError as error:
                raise self.failure(str(error)) from None
            if scores is not None and self.progress.improved_by(scores) and self.directory.writes:
                self.unsaved_best = self.parts.model.state_dict()
        return scores

    def read_results(self) -> None:
        """Take up the results of the steps since the last time. Raises TrainError where one is not finite."""
        p = self.progress
        while self.pending:
            result, images, lr = self.pending[0]
            loss = float(result.loss)
            self.check_finite(loss, float(result.grad_norm))
            self.log("step", self.oldest_pending, {"loss": loss, "lr": lr})
            p.loss_sum += loss * images
            p.correct += int(result.correct)
            p.seen += images
            self.pending.popleft()
        self.read_at = time.monotonic()

    @property
    def oldest_pending(self) -> int:
        """The number of the first step whose result is not read yet."""
        return self.progress.step - len(self.pending) + 1

    def check_finite(self, loss: float, grad_norm: float) -> None:
        """Raise TrainError for a loss or a gradient that is not finite."""
        if not math.isfinite(loss):
            raise self.failure(f"the loss is {loss}")
        if not math.isfinite(grad_norm) and self.parts.step.loss_scale <= 1:  # else the scale is halved instead
            raise self.failure("the gradient is not finite")

    def failure(self, problem: str) -> TrainError:
        """The error for a problem in the first step whose result is not read yet."""
        return TrainError(
            f"{problem} at step {self.oldest_pending} (learning rate {self.parts.optimizer.lr:g}): try a lower --lr; "
            f"{self.directory.last} holds the last good weights"
        )

    def correct_length(self) -> None:
        """Fit the number of steps into the time that is left."""
        assert self.budget is not None
        self.read_results()  # waits until the steps are done
        p = self.progress
        epoch_end = self.epoch_end_seconds / p.epoch if p.epoch else None
        seconds = p.seconds - self.seconds_before - self.epoch_end_seconds
        length = self.budget.correct(p.step, p.batch, seconds, epoch_end)
        self.length = RunLength(*self.group.from_first(dataclasses.astuple(length)))
        self.directory.write_config(self.config, self.length)
        self.save()  # a killed run must not repeat steps of the old length under the new one
        self.group.exchange(None, SLOW)  # the files are written
        self.display.lengthen(self.length.total_steps)

    def save_and_stop(self, signum: int) -> NoReturn:
        self.save()
        self.group.exchange(None, SLOW)  # the files are written: no process may end before
        raise Stopped(signum, self.directory.path)

    def save(self) -> None:
        """Write all that resuming needs, and before it the best weights."""
        self.read_results()
        self.save_best()
        progress = dataclasses.asdict(self.progress)
        self.directory.save(self.directory.last, self.parts.tensors, {**self.description, "progress": progress})
        self.saved_at = time.monotonic()

    def save_best(self) -> None:
        """Write the best weights if they are newer than the file."""
        if (best := self.unsaved_best) is not None:
            self.directory.save(self.directory.best, lambda: best, self.description)
            self.unsaved_best = None


def epoch_line(row: Mapping[str, Any], length: RunLength) -> str:
    """The line of the log for one row of metrics.jsonl."""
    return (
        f"epoch {length.epochs_after(row['step'])}"
        f"  training loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:6.1%}"
        f"  validation loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:6.1%}"
        f"  {row['images_per_second']:.0f} images/s  {clock(row['seconds'])}"
    )
