"""Learning-rate schedules: functions of the step, counted from 0."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """The learning rate `lr`, multiplied by `gamma` every `step_size` steps."""

    lr: float
    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.step_size < 1:
            raise ValueError(f"step_size must be at least 1, got {self.step_size}")

    def __call__(self, step: int) -> float:
        return self.lr * self.gamma ** (step // self.step_size)


@dataclass(frozen=True)
class WarmupCosine:
    """A straight rise over `warmup_steps`, then half a cosine down to `final_lr` (Loshchilov & Hutter 2017, eq. 5).

    Step 0 already learns: its rate is lr / (warmup_steps + 1). Step `warmup_steps` has the full rate, step
    `total_steps` (the first one after the training) and all later ones `final_lr`.
    """

    lr: float
    total_steps: int
    warmup_steps: int = 0
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps must be between 0 and total_steps = {self.total_steps}, got {self.warmup_steps}"
            )

    def __call__(self, step: int) -> float:
        if step >= self.total_steps:
            return self.final_lr
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2
