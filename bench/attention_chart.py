"""An image of an attention benchmark: each contender's rate for every shape, under what the device allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOF = "roofline, from the measured peaks"
COLOURS = {
    "tinyvit": "#d62728",
    "reference": "#ff9f80",
    "torch flash": "#1f4e9c",
    "torch cudnn": "#3f8fd2",
    "torch efficient": "#7fc4e8",
    "torch math": "#b5b5b5",
}


def draw(record: dict, titles: dict[str, str], path: Path) -> None:
    """Write a PNG with one panel for each kind of work.

    Args:
        record: what attention_bench writes as JSON.
        titles: the kinds and what to call them.
        path: where to; a name's ending does not matter.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = record["results"]
    figure = Figure(figsize=(max(7.0, 2.0 + 0.75 * len(results)), 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(titles), 1, sharex=True)
    for panel, (kind, title) in zip(panels, titles.items(), strict=True):
        _bars(panel, results, kind, record["device"])
        panel.set_title(title, loc="left")
    panels[-1].set_xticks(range(len(results)), [_label(r, results) for r in results], fontsize=8)
    figure.suptitle(f"Attention, {record['machine'].get('gpu', 'CPU')}: higher is faster")
    named = sorted(zip(*panels[0].get_legend_handles_labels(), strict=True), key=lambda pair: pair[1] == ROOF)
    columns = min(len(named), int(figure.get_figwidth() // 1.75))  # which fit side by side
    figure.legend(*zip(*named, strict=True), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=130, format="png")


def _bars(panel: Any, results: list[dict], kind: str, device: str) -> None:
    unit, scale = ("TFLOP/s", 1e12) if device == "cuda" else ("GFLOP/s", 1e9)
    names = list(results[0][kind]["contenders"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        rates = [r[kind]["contenders"][name].get("flops_per_second", 0.0) / scale for r in results]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(results))]
        panel.bar(places, rates, 0.92 * width, color=COLOURS[name], label=name)
    roof = [r[kind]["flops"] / r[kind]["floor_seconds"] / scale for r in results]
    panel.hlines(roof, [x - 0.45 for x in range(len(results))], [x + 0.45 for x in range(len(results))],
                 color="black", linewidth=1, label=ROOF)  # fmt: skip
    panel.set_ylabel(unit)
    panel.set_xlim(-0.6, len(results) - 0.4)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _label(result: dict, results: list[dict]) -> str:
    lines = [result["case"], f"batch {result['batch']}", f"N {result['tokens']}"]
    return "\n".join(lines + [result["dtype"]] * (len({r["dtype"] for r in results}) > 1))
