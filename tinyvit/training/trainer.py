"""The training loop, stoppable and resumable at any step.

A run is a function of its options, its data and its number of steps, so a resumed run ends with the same bits as
an unbroken one: the order of the images, the augmentation and dropout follow from (seed, epoch, step), and all
that changes from step to step is `Position`, the weights, their average and the optimizer's state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit import optim
from tinyvit.backend import arrays
from tinyvit.checkpoints.checkpoint import BEST, LAST, TRAINING_PREFIXES, Checkpoint, CheckpointError, describe
from tinyvit.checkpoints.native_file import read, read_metadata, save
from tinyvit.data import Augment, Data, Loader, Split
from tinyvit.data.splits import unvaried
from tinyvit.evaluation.metrics import EvaluationError, Scores, evaluate, pick_device
from tinyvit.execution import system_info
from tinyvit.execution.train_step import Outcome, TrainStep
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.training import run_directory
from tinyvit.training.build import make_augmentation, make_model, make_optimizer
from tinyvit.training.config import VAL_FRACTION, TrainConfig
from tinyvit.training.finetune import FeatureSplit, Head, as_they_are, class_weights
from tinyvit.training.progress import Display, clock
from tinyvit.training.schedule import Deadline, Plan, learning_rate

READ_EVERY = 1.0  # seconds: reading a step's numbers from a device waits for it, and the device then for the next one

SAVE_EVERY = 10.0  # seconds, at least, for a run on features, whose epochs are shorter than saving the frozen weights

Stop = Callable[[], int | None]  # tells which signal asked the run to stop, if one did


class TrainError(Exception):
    """Training that cannot go on; the message is one line."""


class Stopped(Exception):
    """A signal stopped the run at `out`, which was saved."""

    def __init__(self, signum: int, out: Path) -> None:
        super().__init__(signum, out)
        self.signum, self.out = signum, out


@dataclasses.dataclass
class Position:
    """Where a run is: everything besides arrays that changes while it goes."""

    step: int = 0
    epoch: int = 0  # epochs that are done
    batch: int = 0  # batches done of the epoch under way, and its sums:
    seen: int = 0
    correct: int = 0
    loss_sum: float = 0.0
    epoch_seconds: float = 0.0  # of its steps
    seconds: float = 0.0  # of the whole run, evaluations included
    best_accuracy: float = -1.0
    best_loss: float = 0.0
    best_epoch: int = 0
    finished: bool = False
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # the rows of metrics.jsonl


def read_position(path: Path) -> Position:
    """Where the run is that wrote `path`, a last.safetensors. Raises CheckpointError."""
    try:
        return Position(**read_metadata(path)["progress"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: its metadata does not say where the run is") from None


class Trainer:
    """A model with its optimizer and data, and the steps and epochs that train it.

    `options` are complete: nothing is left to be chosen from the data (see `train.complete`). `checkpoint` is what
    `options.init` names.
    """

    def __init__(
        self, options: TrainConfig, data: Data, plan: Plan, display: Display, checkpoint: Checkpoint | None
    ) -> None:
        self.options, self.data, self.plan, self.display = options, data, plan, display
        self.out = Path(options.out)
        self.position = Position()
        self.drawn = self.saved = time.monotonic()  # when curves.png was drawn and the weights were written last
        self.unsaved_best: dict[str, np.ndarray] = {}  # the best weights, where they are not written yet
        self.deadline: Deadline | None = None
        self.end_seconds = 0.0  # spent on the ends of epochs
        self.unread: list[tuple[Outcome, int]] = []  # what the latest steps brought, with their images
        self.read_at = time.monotonic()
        self.model = make_model(options, data, checkpoint).to(pick_device(options.device))
        self.opt = make_optimizer(options, self.model)
        # What the steps compute: all of the model, or the head alone on features that were computed before.
        on_features = isinstance(data.train, FeatureSplit)
        self.trained = Head(self.model) if on_features else self.model
        self.save_every = SAVE_EVERY if on_features else 0.0
        self.scaling = as_they_are if on_features else Augment(data.mean, data.std)
        self.ema = optim.EMA(self.model, options.ema) if options.ema else None
        weighted = options.class_weights == "balanced"
        balanced = class_weights(data.train.labels, len(data.class_names)) if weighted else None
        self.step = TrainStep(
            self.trained,
            self.opt,
            clip_norm=options.clip_norm or None,
            label_smoothing=options.label_smoothing,
            accumulate=options.accumulate,
            ema=self.ema,
            seed=options.seed,
            threads=options.threads,
            class_weights=balanced,
            precision=options.precision,
        )
        self.read_every = 0.0 if arrays.on_host(self.step.parameters[0].data) else READ_EVERY
        self.loader = Loader(
            data.train if options.augment else unvaried(data.train),
            options.batch_size,
            transform=as_they_are if on_features else make_augmentation(options, data),
            seed=options.seed,
            drop_last=True,
            device=arrays.device_name(self.step.parameters[0].data),
        )

    # --- what is written ----------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and metadata of last.safetensors: weights under their own names, the rest with a prefix."""
        tensors = self.model.state_dict()
        tensors |= {f"optimizer.{name}": array for name, array in self.opt.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": array for name, array in self.ema.state_dict().items()}
        tensors |= {f"step.{name}": array for name, array in self.step.state_dict().items()}
        return tensors, self.description() | {"progress": dataclasses.asdict(self.position)}

    def save_last(self) -> None:
        """Write all that --resume needs, and before it the best weights."""
        self.read_outcomes()
        self.save_best()
        save(self.out / LAST, *self.state())
        self.saved = time.monotonic()

    def save_best(self) -> None:
        """Write the best weights, where they are newer than the file."""
        if self.unsaved_best:
            save(self.out / BEST, self.unsaved_best, self.description())
            self.unsaved_best = {}

    def restore(self) -> None:
        """Take up the state in last.safetensors. Raises CheckpointError."""
        path = self.out / LAST
        tensors, _ = read(path)
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}, "ema": {}, "step": {}}
        for name, array in tensors.items():
            if not np.all(np.isfinite(array)):
                raise CheckpointError(f"{path}: {name} holds values that are not finite")
            prefix, _, rest = name.partition(".")
            if f"{prefix}." in TRAINING_PREFIXES:
                parts[prefix][rest] = array
            else:
                parts["model"][name] = array
        try:
            self.model.load_state_dict(parts["model"])
            self.opt.load_state_dict(parts["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(parts["ema"])
            self.step.load_state_dict(parts["step"])
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit the run: {error}") from None
        self.position = read_position(path)
        self.step.step_index = self.position.step

    def description(self) -> dict[str, Any]:
        """What the weights mean, for whoever opens them."""
        split = {"val_fraction": self.options.val_fraction or VAL_FRACTION, "seed": self.options.seed}
        data = self.data
        preprocessing = Preprocessing(data.mean, data.std, **data.fit_options)
        return describe(self.model.config, data.class_names, preprocessing, split)

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        data = self.data
        sizes = {"train": len(data.train), "val": len(data.validation), "test": len(data.test)}
        return {
            "options": dataclasses.asdict(self.options),
            "plan": dataclasses.asdict(self.plan),
            "data": {"name": data.name, "fingerprint": data.fingerprint, **sizes},
            "versions": run_directory.versions(),
            "device": system_info.describe_device(self.step.parameters[0].data),
            **self.description(),
        }

    # --- training -----------------------------------------------------------------------------------------

    def run(self, stop: Stop) -> None:
        """Train until the plan is fulfilled. Raises Stopped, TrainError, OSError."""
        self.display.start(self.plan.total_steps, self.position.step)
        try:
            while not self.position.finished:
                self.train_epoch(stop)
                self.finish_epoch(stop)
        finally:
            self.display.stop()
            self.save_best()

    def train_epoch(self, stop: Stop) -> None:
        """Do those steps of the epoch under way that are still to do."""
        p, rate = self.position, learning_rate(self.options, self.plan)
        begun = time.monotonic()
        for images, labels in self.loader.epoch(p.epoch, first_batch=p.batch):
            if p.step >= self.plan.total_steps:
                break
            self.opt.lr = rate(p.step)
            self.step(images, labels)
            self.unread.append((self.step.outcome, labels.shape[0]))
            p.step, p.batch = p.step + 1, p.batch + 1
            if read := time.monotonic() - self.read_at >= self.read_every:
                self.read_outcomes()
            begun, seconds = time.monotonic(), time.monotonic() - begun
            p.epoch_seconds, p.seconds = p.epoch_seconds + seconds, p.seconds + seconds
            if self.deadline is not None and p.step in self.deadline.due:
                self.correct_plan(self.deadline)
                rate = learning_rate(self.options, self.plan)
            if read:
                speed = p.seen / p.epoch_seconds
                self.display.step(p.step, p.epoch + 1, p.loss_sum / p.seen, p.correct / p.seen, speed)
            if signum := stop():
                self.save_last()
                raise Stopped(signum, self.out)

    def read_outcomes(self) -> None:
        """Take up what the steps since the last time brought. Raises TrainError where it is not finite."""
        p = self.position
        while self.unread:
            outcome, images = self.unread[0]
            loss = float(outcome.loss)
            self.check_finite(loss, float(outcome.grad_norm))
            p.seen, p.correct = p.seen + images, p.correct + int(outcome.correct)
            p.loss_sum += loss * images
            del self.unread[0]
        self.read_at = time.monotonic()

    def correct_plan(self, deadline: Deadline) -> None:
        """Fix the number of steps, now that their time is known better. Warm-up stays as it was."""
        self.read_outcomes()  # which waits until the steps are done
        p = self.position
        end_seconds = self.end_seconds / p.epoch if p.epoch else None
        self.plan = deadline.corrected(p.step, p.batch, p.seconds - self.end_seconds, end_seconds)
        run_directory.write_config(self.out, self.config())
        self.save_last()  # a killed run must not repeat steps of the old plan under the new one
        self.display.lengthen(self.plan.total_steps)

    def check_finite(self, loss: float, grad_norm: float) -> None:
        if not math.isfinite(loss):
            raise self.failure(f"the loss is {loss}")
        if not math.isfinite(grad_norm) and self.step.loss_scale <= 1:  # else it is halved, and the step left out
            raise self.failure("the gradient is not finite")

    def failure(self, what: str) -> TrainError:
        return TrainError(
            f"{what} at step {self.position.step - len(self.unread) + 1} (learning rate {self.opt.lr:g}, "
            f"largest gradient {self.step.largest_grad:g}): try a lower --lr; "
            f"{self.out / LAST} holds the last good weights"
        )

    def evaluate(self, split: Split, stop: Stop = lambda: None) -> Scores | None:
        """Scores of the model as it is; None when asked to stop meanwhile."""
        return evaluate(
            self.trained,
            split,
            split.labels,
            self.data.class_names,
            self.scaling,
            threads=self.options.threads,
            precision=self.options.precision,
            stop=stop,
        )

    def finish_epoch(self, stop: Stop) -> None:
        """Evaluate, and write what the epoch brought, in an order that leaves a sound run wherever it is killed."""
        p, begun = self.position, time.monotonic()
        self.read_outcomes()
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            try:
                scores = self.evaluate(self.data.validation, stop)
            except EvaluationError as error:
                raise self.failure(str(error)) from None
            is_best = scores is not None and self.is_best(scores)
            if is_best:
                self.unsaved_best = self.model.state_dict()
        if scores is None:
            self.save_last()  # every batch of the epoch is done: a resumed run begins with the evaluation
            raise Stopped(stop(), self.out)
        before = p.seconds
        p.epoch, p.seconds = p.epoch + 1, before + time.monotonic() - begun
        row = self.row(scores)
        p.history.append(row)
        p.batch, p.seen, p.correct, p.loss_sum, p.epoch_seconds = 0, 0, 0, 0.0, 0.0
        if is_best:
            p.best_accuracy, p.best_loss, p.best_epoch = scores.accuracy, scores.loss, p.epoch
        in_vain = p.epoch - p.best_epoch
        given_up = self.options.patience is not None and in_vain >= self.options.patience
        p.finished = given_up or p.step >= self.plan.total_steps
        run_directory.write_metrics(self.out, p.history)
        if p.finished or time.monotonic() - self.saved >= self.save_every:
            self.save_last()
        self.draw_curves()
        self.display.line(epoch_line(row, math.ceil(self.plan.epochs)))
        if given_up and p.step < self.plan.total_steps:
            self.display.line(f"stopping early: {in_vain} epochs without a better validation accuracy")
        self.end_seconds += time.monotonic() - begun
        p.seconds = before + time.monotonic() - begun

    def is_best(self, scores: Scores) -> bool:
        """Whether this beats every epoch before; between equal accuracies the loss decides."""
        return (scores.accuracy, -scores.loss) > (self.position.best_accuracy, -self.position.best_loss)

    def row(self, scores: Scores) -> dict[str, Any]:
        """The line of metrics.jsonl for the epoch that ends here; `seconds` are those of the run so far."""
        p = self.position
        return {
            "epoch": p.epoch,
            "step": p.step,
            "train_loss": p.loss_sum / p.seen,
            "train_accuracy": p.correct / p.seen,
            "val_loss": scores.loss,
            "val_accuracy": scores.accuracy,
            "val_top5": scores.top5,
            "lr": self.opt.lr,
            "images_per_second": p.seen / p.epoch_seconds,
            "seconds": p.seconds,
        }

    def draw_curves(self) -> None:
        """Draw curves.png, but no more often than every DRAW_EVERY seconds except at the end."""
        now = time.monotonic()
        if self.position.finished or now - self.drawn >= run_directory.DRAW_EVERY:
            self.drawn = now
            run_directory.write_curves(self.out, self.position.history, f"{self.options.model} on {self.data.name}")


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch of the log."""
    return (
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}"
        f"  training loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:6.1%}"
        f"  validation loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:6.1%}"
        f"  {row['images_per_second']:.0f} images/s  {clock(row['seconds'])}"
    )
