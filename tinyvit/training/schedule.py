"""How many steps a run has, and the learning rate at each of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from tinyvit import optim


@dataclasses.dataclass(frozen=True)
class RunLength:
    """How long a run is, in training steps."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int

    @classmethod
    def of(cls, total_steps: int, steps_per_epoch: int, warmup: float) -> RunLength:
        """A run of `total_steps`; `warmup` below 1 is a share of the run, from 1 on a number of epochs."""
        warmup_steps = round(warmup * (total_steps if warmup < 1 else steps_per_epoch))
        return cls(total_steps, steps_per_epoch, min(warmup_steps, total_steps - 1))

    def with_total(self, total_steps: int) -> RunLength:
        """The same run with another number of steps; the warm-up stays as it is."""
        return RunLength(total_steps, self.steps_per_epoch, min(self.warmup_steps, total_steps - 1))

    def epochs_after(self, step: int) -> str:
        """How many epochs `step` steps are, of how many: "3/20", or "0.4/0.4" where the run ends within an epoch."""
        total = self.total_steps / self.steps_per_epoch
        if self.total_steps % self.steps_per_epoch == 0:
            return f"{step // self.steps_per_epoch:{len(str(int(total)))}}/{int(total)}"
        return f"{step / self.steps_per_epoch:.3g}/{total:.3g}"


def learning_rate(schedule: str, lr: float, length: RunLength) -> Callable[[int], float]:
    """The learning rate at each step, counted from 0.

    Args:
        schedule: "cosine"; "linear", down to 0; "step", which divides the rate by ten after each third of the run; or
            "constant". Each begins with a linear warm-up.
        lr: the highest rate.
    """
    if schedule == "cosine":
        return optim.WarmupCosine(lr, length.total_steps, length.warmup_steps)
    courses: dict[str, Callable[[int], float]] = {
        "linear": lambda step: lr * (1 - step / length.total_steps),
        "step": optim.Step(lr, math.ceil(length.total_steps / 3), 0.1),
        "constant": lambda step: lr,
    }
    course = courses[schedule]
    return lambda step: course(step) * min(1.0, (step + 1) / (length.warmup_steps + 1))
