"""The output of a training run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tinyvit.files.text import printable

SILENCE = 30.0  # seconds after which a line is due where there is no bar


def clock(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """Lines go to standard output; a bar, when standard error is a terminal, to standard error."""

    def __init__(self) -> None:
        self._bar: Any = None  # tqdm has no types

    def start(self, total_steps: int, done: int) -> None:
        """Begin to show steps, `done` of which lie behind."""
        self._total, self._first, self._done = total_steps, done, done
        self._begun = self._spoken = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            size = {"dynamic_ncols": True} if columns else {"ncols": 100, "nrows": 20}  # some do not say, and tqdm
            self._bar = tqdm(total=total_steps, initial=done, unit="step", file=sys.stderr, **size)  # would be silent

    def step(self, done: int, epoch: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show that so many steps are done, with this epoch's figures so far."""
        more, self._done = done - self._done, done
        now = time.monotonic()
        if self._bar is not None:
            figures = f"epoch {epoch}, loss {loss:.3f}, accuracy {accuracy:.1%}, {images_per_second:.0f} images/s"
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(more)
        elif now - self._spoken >= SILENCE:
            left = (now - self._begun) / (self._done - self._first) * (self._total - self._done)
            self.line(
                f"epoch {epoch}  step {self._done}/{self._total}  loss {loss:.3f}  accuracy {accuracy:.1%}  "
                f"{images_per_second:.0f} images/s  {clock(left)} left"
            )

    def evaluating(self, epoch: int, images: int) -> None:
        """Say that an epoch's evaluation goes on, where nothing has been printed for SILENCE."""
        if self._bar is None and time.monotonic() - self._spoken >= SILENCE:
            self.line(f"epoch {epoch}  evaluating {images} validation images")

    def lengthen(self, total_steps: int) -> None:
        """Another number of steps is the whole."""
        self._total = total_steps
        if self._bar is not None:
            self._bar.total = total_steps

    def line(self, text: str) -> None:
        """Print a line of the log."""
        self._spoken = time.monotonic()
        if self._bar is not None:
            self._bar.clear()
        print(printable(text), flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
