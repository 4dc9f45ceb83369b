"""How far long work is, on standard error: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

INTERVAL = 1.0  # seconds until a terminal shows a bar, and between two drawings
SILENCE = 30.0  # seconds between two lines where there is no terminal


@contextlib.contextmanager
def bar(
    what: str, total: int | None, shown: bool = True, before: int = 0, unit: str = " images"
) -> Iterator[Callable[[int], object]]:
    """Within this context show how many of `total` images, or "B"ytes, are done, unless that is soon over.

    `before` of them were done before. Gives what to call, from any thread, with the number that was done since the
    last call.
    """
    done, over, shown = [before], threading.Event(), shown and total != 0
    thread = threading.Thread(target=_show, args=(what, total, done, over, unit), daemon=True)
    if shown:
        thread.start()
    try:
        yield done.append
    finally:
        over.set()
        if shown:
            thread.join()  # the bar is gone before anything else is printed


def _show(what: str, total: int | None, done: list[int], over: threading.Event, unit: str) -> None:
    """Not by tqdm's own drawing, which waits for the next image, and is silent where a terminal has 0 columns."""
    begun, terminal, columns = time.monotonic(), sys.stderr.isatty(), 0
    with contextlib.suppress(OSError):  # nobody reads on
        while not over.wait(INTERVAL if terminal else SILENCE):
            from tqdm import tqdm

            columns = (os.get_terminal_size(sys.stderr.fileno()).columns if terminal else 0) or 100
            elapsed = time.monotonic() - begun
            style: Any = dict(ascii=True, unit=unit, unit_scale=unit == "B", initial=done[0])
            text = tqdm.format_meter(sum(done), total, elapsed, columns - 1, what, **style)
            print(f"\r{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
        if terminal and columns:
            print(f"\r{'':{columns - 1}}\r", end="", file=sys.stderr, flush=True)
