"""Charts as SVG text, which pages and notebooks show without any library. Hovering over a mark shows its exact values.

Text has the colour of what is around it, and the series have those of the page's variables --c0, --c1, …, or, outside
a page, colours of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from tinyvit.files.text import printable

COLOURS = ("#2f6fd6", "#d1582b", "#2c9462", "#a24ac2", "#b8860b", "#0f8ea3", "#c23b6d", "#6b7f2a", "#7a6652", "#5d5fc9")
WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 14, 44  # margins around the axes; LEFT grows with the labels there
MOST_DOTS = 60  # points of a line that are marked, at most

Range = tuple[float, float]


def label(text: str) -> str:
    """Text that may hold anything, as it may stand in a page."""
    return escape(printable(text))


def colour(number: int) -> str:
    """The colour of a series."""
    return f"var(--c{number % len(COLOURS)}, {COLOURS[number % len(COLOURS)]})"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most about `most` of them, a step of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(places: Sequence[float], unit: str = "") -> list[str]:
    """Labels of ticks, all with as many decimals as their step needs; "%" and " %" as `unit` make shares percentages.

    Very large and very small numbers are written with the power of ten of the largest.
    """
    places = [100 * t for t in places] if "%" in unit else places
    if len(places) < 2:
        return [f"{t:.6g}{unit}" for t in places]
    first, last = (math.floor(math.log10(x) + 1e-9) for x in (max(map(abs, places)), places[1] - places[0]))
    if -5 < first < 6:
        return [f"{t:.{max(0, -last)}f}{unit}" for t in places]
    return [f"{t / 10.0**first:.{first - last}f}e{first}{unit}" for t in places]


def around(values: Sequence[float], least_span: float, within: Range = (-math.inf, math.inf)) -> Range:
    """A range that shows `values` without making small differences large: it spans `least_span` or more."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    margin = max(0.05 * (high - low), (least_span - (high - low)) / 2)
    low, high = max(low - margin, within[0]), min(high + margin, within[1])
    missing = max(0.0, least_span - (high - low))  # cut off at one end: take it from the other
    return max(low - missing, within[0]), min(high + missing, within[1])


class Axes:
    """A frame with ticks, into which marks are put."""

    def __init__(
        self, x: Range, y: Range, x_label: str, y_label: str, *, whole_x: bool = False, percent: bool = False
    ) -> None:
        self.x, self.y = (r if r[1] > r[0] else (r[0] - 0.5, r[0] + 0.5) for r in (x, y))
        self.marks: list[str] = []
        y_ticks, x_ticks = ticks(*self.y), [t for t in ticks(*self.x) if not whole_x or t == round(t)]
        y_labels = tick_labels(y_ticks, " %" if percent else "")
        self.left = max(LEFT, 26 + 8 * max(map(len, y_labels), default=0))
        for t, text in zip(y_ticks, y_labels, strict=True):
            place = self.down(t)
            self.marks.append(f'<path class="grid" d="M{self.left} {place:.1f}H{WIDTH - RIGHT}"/>')
            self.text(self.left - 6, place + 4, text, "end")
        for t, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
            self.text(self.across(t), HEIGHT - BOTTOM + 18, text, "middle")
        self.marks.append(f'<path class="axis" d="M{self.left} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
        self.text((self.left + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        self.marks.append(
            f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{label(y_label)}</text>'
        )

    def across(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - self.left - RIGHT)

    def down(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        self.marks.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{label(text)}</text>')

    def above(self, x: float, text: str, size: float) -> None:
        """Small text above the axes."""
        place = f'x="{self.across(x):.1f}" y="{TOP - 4}" text-anchor="middle" font-size="{size:.3g}"'
        self.marks.append(f"<text {place}>{label(text)}</text>")

    def rule(self, x: float) -> None:
        """A pale line from bottom to top."""
        self.marks.append(f'<path class="grid" d="M{self.across(x):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')

    def dot(self, x: float, y: float, series: int, hint: str, radius: float = 3) -> None:
        self.marks.append(
            f'<circle cx="{self.across(x):.1f}" cy="{self.down(y):.1f}" r="{radius}" fill="{colour(series)}">'
            f"<title>{label(hint)}</title></circle>"
        )

    def line(self, xs: Sequence[float], ys: Sequence[float], series: int, *, dashed: bool = False) -> None:
        """A line through the points that are finite."""
        points = [f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.marks.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour(series)}" stroke-width="2"{dashes}/>'
        )

    def bar(self, low: float, high: float, y: float, series: int, hint: str) -> None:
        """A bar from the bottom of the axes to y, between two places on the x axis."""
        left, top = self.across(low), self.down(y)
        self.marks.append(
            f'<rect x="{left + 0.5:.1f}" y="{top:.1f}" width="{self.across(high) - left - 1:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{colour(series)}" opacity="0.75">'
            f"<title>{label(hint)}</title></rect>"
        )

    def svg(self, name: str) -> str:
        """The chart; `name` is what a screen reader says."""
        return chart(WIDTH, HEIGHT, name, "".join(self.marks))


STYLE = (
    "svg.chart{max-width:100%;height:auto;font:12px system-ui,sans-serif}svg.chart text{fill:currentColor}"
    "svg.chart .grid{stroke:currentColor;opacity:.15;fill:none}svg.chart .axis{stroke:currentColor;fill:none}"
)


def chart(width: int, height: int, name: str, marks: str) -> str:
    return (
        f'<svg class="chart" role="img" aria-label="{label(name)}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{marks}</svg>'
    )


def lines(
    name: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    least_span: float = 0.0,
    within: Range = (-math.inf, math.inf),
    percent: bool = False,
) -> str:
    """Lines through points, with a legend below; a single point is a dot.

    Args:
        series: xs and ys by name; a name that ends in "training" is drawn dashed.
        least_span, within: of the y axis; see `around`.
    """
    all_x = [x for xs, _ in series.values() for x in xs] or [0.0]
    all_y = [y for _, ys in series.values() for y in ys]
    axes = Axes((min(all_x), max(all_x)), around(all_y, least_span, within), x_label, y_label, whole_x=True,
                percent=percent)  # fmt: skip
    for number, (which, (xs, ys)) in enumerate(series.items()):
        axes.line(xs, ys, number, dashed=which.endswith("training"))
        every = max(1, math.ceil(len(xs) / MOST_DOTS))
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if math.isfinite(y) and (i % every == 0 or i == len(xs) - 1):
                exact = f"{100 * y:.2f} %" if percent else f"{y:.4g}"
                axes.dot(x, y, number, f"{which}, {x_label} {x:g}: {exact}")
    return axes.svg(name) + legend(list(series))


def legend(names: Sequence[str]) -> str:
    """The names of series beside their colours."""
    keys = (
        f'<span style="display:inline-block;margin-right:1em"><svg width="12" height="12" aria-hidden="true">'
        f'<circle cx="6" cy="6" r="5" fill="{colour(i)}"/></svg> {label(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def matrix(name: str, counts: np.ndarray, names: Sequence[str], rows: str, columns: str) -> str:
    """A square matrix of counts (K, K) as cells, darker for a larger share of their row, with the counts in them."""
    cell, size = 34, len(counts)
    left = 34 + 7 * min(18, max(map(len, names)))  # room for the names, and above them for what the columns are
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    short = [label(n if len(n) <= 18 else f"{n[:17]}…") for n in names]
    marks = [f'<text x="{left + size * cell / 2}" y="14" text-anchor="middle">{label(columns)}</text>']
    for i in range(size):
        y = left + i * cell
        marks.append(f'<text x="{left - 6}" y="{y + 21}" text-anchor="end">{short[i]}</text>')
        marks.append(f'<text transform="translate({left + i * cell + 21} {left - 6}) rotate(-90)">{short[i]}</text>')
        for j in range(size):
            share, x = shares[i, j], left + j * cell
            kind = "hit" if i == j else "miss"
            marks.append(
                f'<rect class="{kind}" x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" '
                f'fill="{colour(0 if i == j else 1)}" fill-opacity="{0.06 + 0.44 * share:.3f}"><title>'
                f"{label(f'{names[i]} taken for {names[j]}: {counts[i, j]} ({share:.1%})')}</title></rect>"
            )
            if counts[i, j]:
                marks.append(f'<text x="{x + cell / 2}" y="{y + 21}" text-anchor="middle" '
                             f'pointer-events="none">{counts[i, j]}</text>')  # fmt: skip
    marks.append(f'<text x="4" y="{left - 6}">{label(rows)}</text>')
    return chart(left + size * cell + 10, left + size * cell + 10, name, "".join(marks))
