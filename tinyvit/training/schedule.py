"""How long a run is and how its learning rate goes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tinyvit import optim
from tinyvit.checkpoints.native_file import save
from tinyvit.training import run_directory
from tinyvit.training.config import TrainConfig

if TYPE_CHECKING:
    from tinyvit.data import Split
    from tinyvit.training.trainer import Trainer

REHEARSAL_SHARE, REHEARSAL_MAX = 0.04, 15.0  # how long steps are timed: share of the time left, seconds
CORRECTED_AFTER = (0.1, 0.3)  # of the steps: a machine may become faster or slower
WARM_UP, TIMED = 2, 3  # steps that are not timed, and the fewest that are


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int

    @property
    def epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch


def make_plan(total_steps: int, steps_per_epoch: int, warmup: float) -> Plan:
    """`warmup` below 1 is a share of the run, from 1 on a number of epochs."""
    warmup_steps = round(warmup * (total_steps if warmup < 1 else steps_per_epoch))
    return Plan(total_steps, steps_per_epoch, min(warmup_steps, total_steps - 1))


def steps_that_fit(seconds: float, step_seconds: float, epoch_end_seconds: float, steps_per_epoch: int) -> int:
    """How many steps fit, when each epoch, also a partial last one, ends with `epoch_end_seconds` of other work."""
    epoch_seconds = steps_per_epoch * step_seconds + epoch_end_seconds
    whole = max(0, math.floor(seconds / epoch_seconds))
    rest = seconds - whole * epoch_seconds - epoch_end_seconds
    return max(1, whole * steps_per_epoch + min(steps_per_epoch, max(0, math.floor(rest / step_seconds))))


def learning_rate(options: TrainConfig, plan: Plan) -> Callable[[int], float]:
    """The learning rate at each step; the step schedule divides it by ten after each third of the run."""
    if options.schedule == "cosine":
        return optim.WarmupCosine(options.lr, plan.total_steps, plan.warmup_steps)
    if options.schedule == "step":
        schedule = optim.Step(options.lr, math.ceil(plan.total_steps / 3), 0.1)
    else:
        schedule = optim.Constant(options.lr)
    return lambda step: schedule(step) * min(1.0, (step + 1) / (plan.warmup_steps + 1))


@dataclasses.dataclass(frozen=True)
class FirstOf:
    """The first images of a split, as many as there are `labels`."""

    split: Split
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        return self.split.read(indices, rng)


class Deadline:
    """Fixes how many steps fit before a moment: after a rehearsal, and better once some of them are done.

    `trainer` is a throwaway one, whose out directory exists; `moment` is of time.monotonic(). Evaluations, saves and
    drawings are timed and counted in.
    """

    def __init__(self, trainer: Trainer, moment: float) -> None:
        self.moment = moment
        seconds = min(REHEARSAL_MAX, REHEARSAL_SHARE * max(0.0, moment - time.monotonic()))
        self.step_seconds = time_steps(trainer, seconds)
        self.end_seconds = time_epoch_end(trainer, self.step_seconds, seconds)
        steps_per_epoch = len(trainer.loader)
        total = steps_that_fit(moment - time.monotonic(), self.step_seconds, self.end_seconds, steps_per_epoch)
        self.plan = make_plan(total, steps_per_epoch, trainer.options.warmup)
        self.due = {math.ceil(share * total) for share in CORRECTED_AFTER}  # after these steps
        self.corrected_at = (0, 0.0)  # steps, and their seconds

    def corrected(self, step: int, batch: int, seconds: float, end_seconds: float | None) -> Plan:
        """The plan after `step` steps, which took `seconds` without the ends of epochs; `batch` are of this epoch.

        `end_seconds` is what the end of an epoch took, None when none has ended yet: then what the rehearsal found is
        stretched like a step.
        """
        step_seconds = (seconds - self.corrected_at[1]) / (step - self.corrected_at[0])
        self.corrected_at = step, seconds
        if end_seconds is None:
            end_seconds = self.end_seconds * step_seconds / self.step_seconds
        left = self.moment - time.monotonic() + batch * step_seconds  # as if the epoch were still to begin
        fit = steps_that_fit(left, step_seconds, end_seconds, self.plan.steps_per_epoch)
        total = step + max(1, fit - batch)
        return Plan(total, self.plan.steps_per_epoch, min(self.plan.warmup_steps, total - 1))


def time_steps(trainer: Trainer, seconds: float) -> float:
    """Seconds per training step, over about `seconds` of them, the first WARM_UP ones left out."""
    count = -WARM_UP
    for epoch in itertools.count():
        for images, labels in trainer.loader.epoch(epoch):
            if count == 0:
                began = time.monotonic()
            float(trainer.step(images, labels))
            count += 1
            if count >= TIMED and time.monotonic() - began >= seconds:
                return (time.monotonic() - began) / count


def time_epoch_end(trainer: Trainer, step_seconds: float, seconds: float) -> float:
    """Seconds that evaluating, saving and drawing take at the end of an epoch."""
    split = trainer.data.validation
    n = min(len(split), 1 + int(trainer.options.batch_size * seconds / step_seconds))
    began = time.monotonic()
    trainer.evaluate(FirstOf(split, split.labels[:n]))
    evaluating = (time.monotonic() - began) * len(split) / n
    throwaway = trainer.out / ".rehearsal.safetensors"
    try:
        began = time.monotonic()
        save(throwaway, *trainer.state())
        saving = 2 * (time.monotonic() - began)  # the last weights and, mostly, the best
    finally:
        throwaway.unlink(missing_ok=True)
    row = {name: 1.0 for name in ("epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy")}
    for _ in range(2):  # the first time, matplotlib is imported
        began = time.monotonic()
        run_directory.curves_png([row], "")
        drawing = time.monotonic() - began
    epoch = len(trainer.loader) * step_seconds + evaluating + saving
    if trainer.save_every:
        saving *= min(1.0, epoch / trainer.save_every)
    return evaluating + saving + drawing * min(1.0, epoch / run_directory.DRAW_EVERY)
