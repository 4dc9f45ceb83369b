"""The output of a training run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, Self

from tinyvit.files.bar import SILENCE
from tinyvit.files.text import printable


def clock(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """Lines go to standard output; a bar, when standard error is a terminal, to standard error.

    Within `with`, and as long as there is no bar, SILENCE does not pass without a line, however long a step takes.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self._bar: Any = None  # tqdm has no types
        self._doing, self._spoken, self._over = "", time.monotonic(), threading.Event()

    def __enter__(self) -> Self:
        if self.shown:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _break_silence(self) -> None:
        while not self._over.wait(max(0.0, self._spoken + SILENCE - time.monotonic())):
            if self._bar is not None:
                return
            if time.monotonic() >= self._spoken + SILENCE:
                try:
                    self.line(self._doing)
                except OSError:  # nobody reads on; the run fails with its own next line
                    return

    def doing(self, what: str) -> None:
        """Note what to say when it takes long."""
        self._doing = what

    def start(self, total_steps: int, done: int) -> None:
        """Begin to show steps, `done` of which lie behind."""
        self._total, self._first, self._begun = total_steps, done, time.monotonic()
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            size = {"dynamic_ncols": True} if columns else {"ncols": 100, "nrows": 20}  # some do not say, and tqdm
            self._bar = tqdm(total=total_steps, initial=done, unit="step", file=sys.stderr, **size)  # would be silent

    def step(self, done: int, epoch: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show that so many steps are done, with this epoch's figures so far."""
        figures = f"loss {loss:.3f}", f"accuracy {accuracy:.1%}", f"{images_per_second:.0f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join((f"epoch {epoch}", *figures)), refresh=False)
            self._bar.update(done - self._bar.n)
        left = (time.monotonic() - self._begun) / (done - self._first) * (self._total - done)
        self.doing("  ".join((f"epoch {epoch}", f"step {done}/{self._total}", *figures, f"{clock(left)} left")))

    def lengthen(self, total_steps: int) -> None:
        """Another number of steps is the whole."""
        self._total = total_steps
        if self._bar is not None:
            self._bar.total = total_steps

    def line(self, text: str) -> None:
        """Print a line of the log, unless the display is not `shown`."""
        if not self.shown:
            return
        self._spoken = time.monotonic()
        if self._bar is not None:
            self._bar.clear()
        print(printable(text) + "\n", end="", flush=True)  # at once, as two threads print
        if self._bar is not None:
            self._bar.refresh()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
