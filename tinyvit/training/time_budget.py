"""Runs of a given time: how many steps fit into it, so that the learning-rate schedule ends when the time does."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import numpy as np

from tinyvit.data import Split
from tinyvit.distributed.group import SLOW
from tinyvit.training.build import Parts
from tinyvit.training.run_directory import RunDirectory
from tinyvit.training.schedule import RunLength

REHEARSAL_SHARE, REHEARSAL_MAX = 0.04, 15.0  # how long steps are timed beforehand: share of the time left, seconds
CORRECTED_AFTER = (0.1, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98)  # of the steps: a machine may become faster or slower
UNTIMED_STEPS, TIMED_STEPS = 1, 2  # the first steps are slower; the fewest that are timed


def steps_that_fit(seconds: float, step_seconds: float, epoch_end_seconds: float, steps_per_epoch: int) -> int:
    """How many steps fit, at least one, where each epoch, also a last partial one, ends with some other work."""
    epoch_seconds = steps_per_epoch * step_seconds + epoch_end_seconds
    whole = max(0, math.floor(seconds / epoch_seconds))
    rest = seconds - whole * epoch_seconds - epoch_end_seconds
    return max(1, whole * steps_per_epoch + min(steps_per_epoch, max(0, math.floor(rest / step_seconds))))


@dataclasses.dataclass
class TimeBudget:
    """Fits the number of steps into the time that is left, again and again while a run goes on.

    Attributes:
        end: when the run has to be over, of time.monotonic().
        step_seconds, epoch_end_seconds: the durations of a step, and of evaluating and saving.
        length: the present length of the run.
    """

    end: float
    step_seconds: float
    epoch_end_seconds: float
    length: RunLength

    def __post_init__(self) -> None:
        self._due = {math.ceil(share * self.length.total_steps) for share in CORRECTED_AFTER}
        self._last = (0, 0.0)  # steps and their seconds at the last correction

    @classmethod
    def rehearse(
        cls, end: float, parts: Parts, validation: Split, directory: RunDirectory, warmup: float
    ) -> TimeBudget:
        """A budget from durations that are measured with `parts`. It trains them: make others for the run."""
        group = parts.step.group
        seconds = group.from_first(min(REHEARSAL_MAX, REHEARSAL_SHARE * max(0.0, end - time.monotonic())), SLOW)
        step_seconds = time_steps(parts, seconds)
        epoch_end = time_epoch_end(parts, validation, directory, step_seconds, seconds)
        steps_per_epoch = len(parts.loader)
        total = steps_that_fit(end - time.monotonic(), step_seconds, epoch_end, steps_per_epoch)
        return cls(end, step_seconds, epoch_end, RunLength.of(group.from_first(total, SLOW), steps_per_epoch, warmup))

    def due_after(self, step: int) -> bool:
        """Whether the length is to be corrected after `step` steps: now and then, and when no other step fits."""
        return step in self._due or time.monotonic() + self.step_seconds + self.epoch_end_seconds > self.end

    def correct(self, step: int, batch: int, seconds: float, epoch_end_seconds: float | None) -> RunLength:
        """Fit the rest of the run into the time that is left.

        Args:
            step: steps that are done; `batch` of them belong to the present epoch.
            seconds: duration of those steps, without the ends of epochs.
            epoch_end_seconds: mean duration of the ends of epochs; None before the first one. Then the rehearsal's
                figure is scaled like the duration of a step.
        """
        step_seconds = (seconds - self._last[1]) / (step - self._last[0])
        self._last = step, seconds
        if epoch_end_seconds is None:
            epoch_end_seconds = self.epoch_end_seconds * step_seconds / self.step_seconds
        self.step_seconds, self.epoch_end_seconds = step_seconds, epoch_end_seconds
        left = self.end - time.monotonic() + batch * step_seconds  # as if the epoch were still to begin
        fit = steps_that_fit(left, step_seconds, epoch_end_seconds, self.length.steps_per_epoch)
        self.length = self.length.with_total(step + max(0, fit - batch))
        return self.length


def time_steps(parts: Parts, seconds: float) -> float:
    """Seconds for a training step, measured over about `seconds` after UNTIMED_STEPS."""
    count = -UNTIMED_STEPS
    began = time.monotonic()
    for epoch in itertools.count():
        for images, labels in parts.loader.epoch(epoch):
            if count == 0:
                began = time.monotonic()
            float(parts.step(images, labels))
            count += 1
            spent = parts.step.group.from_first(time.monotonic() - began)
            if count >= TIMED_STEPS and spent >= seconds:
                return spent / count
    raise AssertionError("a loader has at least one batch")


def time_epoch_end(
    parts: Parts, validation: Split, directory: RunDirectory, step_seconds: float, seconds: float
) -> float:
    """Seconds for evaluating and saving at the end of an epoch, of which a part is measured."""
    count = min(len(validation), 1 + int(parts.loader.batch_size * seconds / step_seconds))
    parts.evaluate(validation.take(np.arange(1)))  # the first prediction is slower
    first = validation.take(np.arange(count))
    began = time.monotonic()
    parts.evaluate(first)
    evaluating = (time.monotonic() - began) * len(validation) / count
    throwaway = directory.path / ".rehearsal.safetensors"
    try:
        began = time.monotonic()
        directory.save(throwaway, parts.tensors, {})
        saving = 2 * (time.monotonic() - began)  # the last weights and, mostly, the best
    finally:
        throwaway.unlink(missing_ok=True)
    if parts.save_every:
        saving *= min(1.0, (len(parts.loader) * step_seconds + evaluating + saving) / parts.save_every)
    return evaluating + saving  # the curves, which are drawn now and then, count from the first correction on
