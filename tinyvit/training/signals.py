"""Signals that stop a run: it saves itself and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

Stop = Callable[[], int | None]  # returns the signal that is to stop the run, None if there is none


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Give a function that returns the signal, SIGINT or SIGTERM, that came. A second one ends the process at once."""
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        if sys.stderr.isatty():  # os.write, because the signal may have interrupted a print
            os.write(sys.stderr.fileno(), b"\nstopping after this step; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: None
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
