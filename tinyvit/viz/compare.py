"""Runs side by side: `tinyvit compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinyvit.errors import UsageError
from tinyvit.files.atomic import check_output, write_text
from tinyvit.viz.figures import curve_charts
from tinyvit.viz.page import facts, page
from tinyvit.viz.runs import Run


def read_runs(paths: Sequence[str]) -> dict[str, Run]:
    """Runs by name, or by path where two have one name. Raises CheckpointError, UsageError."""
    runs = [Run.read(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise UsageError("the same run is given twice")
    return dict(zip(names, runs, strict=True))


def rows(runs: dict[str, Run]) -> dict[str, dict[str, str]]:
    """By run: its facts, then the settings in which the runs differ."""
    settings = {name: run.settings for name, run in runs.items()}
    every = dict.fromkeys(key for own in settings.values() for key in own)
    different = [key for key in every if len({own.get(key) for own in settings.values()}) > 1]
    return {name: run.facts() | {key: settings[name].get(key, "-") for key in different} for name, run in runs.items()}


def write_comparison(runs: dict[str, Run], out: Path) -> None:
    """The same as a page, with the validation curves of all runs in one chart."""
    check_output("--out", out)
    curves = curve_charts({name: run.rows for name, run in runs.items()}, parts=("validation",))
    sections = [
        ("Runs", "Facts, then the settings in which the runs differ.", facts(rows(runs))),
        ("Curves", "By epoch, on validation images.", f'<div class="row">{curves}</div>'),
    ]
    write_text(out, page(" and ".join(runs) if len(runs) < 4 else f"{len(runs)} runs", sections))
