"""One HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tinyvit._version import __version__
from tinyvit.viz.svg import COLOURS, label

# The same hues on dark, light enough to be seen there.
DARK = ("#7aa7f0", "#f0936b", "#63c795", "#cf8ae6", "#dcae4a", "#4fc3d6", "#ee7fa5", "#adc25a", "#bfa792", "#9d9ef0")

STYLE = """
:root{color-scheme:light dark;--text:#1c2430;--quiet:#505b6b;--back:#fff;--line:#d5dae2;LIGHT}
@media (prefers-color-scheme:dark){:root{--text:#e6e9ee;--quiet:#aab3c0;--back:#14181f;--line:#39424f;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1rem;font:15px/1.5 system-ui,sans-serif}
body{color:var(--text);background:var(--back)}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .3rem;border-bottom:1px solid var(--line)}
p{color:var(--quiet);margin:.3rem 0 .8rem;max-width:46rem}
.row{--least:24rem;display:grid;gap:1rem}.row>div{min-width:0}
.row{grid-template-columns:repeat(auto-fill,minmax(min(var(--least),100%),1fr))}
.wide{overflow-x:auto}.wide svg.chart{max-width:none}
img{max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem .2rem 0;text-align:right;border-bottom:1px solid var(--line)}
.text,.facts th,.facts td{text-align:left;overflow-wrap:anywhere}th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.5rem,1fr));gap:.8rem}
figure{margin:0}figure img{width:100%}
.photo{width:9rem}
figcaption{font-size:.8rem;line-height:1.3;overflow-wrap:anywhere}
@media print{body{max-width:none}.row{--least:15rem}h2{break-after:avoid}figure,svg.chart{break-inside:avoid}}
"""
SORT = """
for(const b of document.querySelectorAll("th button"))b.onclick=()=>{const th=b.closest("th"),t=th.closest("table"),
i=[...th.parentNode.children].indexOf(th),up=th.ariaSort!=="ascending",v=r=>r.children[i].dataset.v,
body=t.tBodies[0];for(const o of t.querySelectorAll("th"))o.ariaSort=null;th.ariaSort=up?"ascending":"descending";
body.append(...[...body.rows].sort((p,q)=>{const a=v(p),c=v(q),d=isNaN(a)||isNaN(c)?a.localeCompare(c):a-c;
return up?d:-d}))}
"""

NONE = "-"
Cell = str | int | float | None


def page(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
        title: plain text, as all that follows but the HTML.
        sections: heading, a sentence that explains it, and HTML.
    """
    light, dark = (";".join(f"--c{i}:{c}" for i, c in enumerate(colours)) for colours in (COLOURS, DARK))
    style = STYLE.replace("LIGHT", light).replace("DARK", dark)
    body = "".join(f"<section><h2>{label(h)}</h2><p>{label(about)}</p>{html}</section>" for h, about, html in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{label(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="generator" '
        f'content="tinyvit {__version__}"><link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body><h1>{label(title)}</h1>{body}<script>{SORT}</script></body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that is sorted by a click on a heading; floats are shares and shown in percent, None as a dash."""

    def cell(value: Cell) -> str:
        shown = NONE if value is None else f"{value:.2%}" if isinstance(value, float) else label(str(value))
        return f"<td{kind(value)} data-v={json.dumps(label(str(-1 if value is None else value)))}>{shown}</td>"

    def kind(value: Cell) -> str:
        return ' class="text"' if isinstance(value, str) else ""

    kinds = [kind(value) for value in rows[0]] if rows else [""] * len(header)
    head = "".join(f"<th{k}><button>{label(name)}</button></th>" for k, name in zip(kinds, header, strict=True))
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(columns: dict[str, dict[str, str]]) -> str:
    """A table of facts: a row for each heading, and a column for each of `columns`, named if there are several."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    head = "" if len(columns) == 1 else f"<tr><th></th>{''.join(f'<th>{label(c)}</th>' for c in columns)}</tr>"
    rows = [
        f"<tr><th>{label(name)}</th>{''.join(f'<td>{label(c.get(name, NONE))}</td>' for c in columns.values())}</tr>"
        for name in names
    ]
    return f'<div class="wide"><table class="facts">{head}{"".join(rows)}</table></div>'
