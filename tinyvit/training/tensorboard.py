"""Figures of a run for TensorBoard, in event files beside its metrics.jsonl."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tinyvit.errors import UsageError

FLUSH_SECONDS = 10  # after which figures are on disk, at the latest

Log = Callable[[str, int, Mapping[str, float]], None]  # heading, steps that are done, figures by name


def no_log(heading: str, step: int, figures: Mapping[str, float]) -> None:
    """Keep no log."""


def check_log(kind: str) -> None:
    """Refuse a log of a kind, as of --log, whose package is missing. Raises UsageError."""
    if kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UsageError('--log tensorboard needs TensorBoard: pip install "tinyvit[tensorboard]"')


@contextlib.contextmanager
def open_log(kind: str, path: Path, step: int) -> Iterator[Log]:
    """A log in the run directory `path`; `tensorboard --logdir runs` shows those of all runs in runs/.

    Args:
        kind: "tensorboard", or "none" for no log.
        path: an existing directory.
        step: steps that are done. TensorBoard forgets what was logged of later ones before the run was interrupted.
    """
    if kind == "none":
        yield no_log
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(path), flush_secs=FLUSH_SECONDS)

    def log(heading: str, step: int, figures: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=f"{heading}/{name}", simple_value=figures[name]) for name in figures]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    with contextlib.closing(writer):
        writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        yield log
