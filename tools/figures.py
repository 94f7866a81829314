"""HTML for a page that needs nothing else: escaped text, tables, folding parts, a chart, a timeline, and the style of it all.

Knows nothing of runs; `report.py` and `compare.py` say what to show. What is returned is HTML, and so are the arguments
(names, captions, titles, cells, bodies): what comes from a run goes through `esc` first.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tools.terminal import printable

# ---- 1. Text and tables --------------------------------------------------------------------------------------


def esc(text: Any) -> str:
    """Text of a run as HTML.

    >>> esc("<b>&\\x1b")
    '&lt;b&gt;&amp;\ufffd'
    """
    return html.escape(printable(text))


def number(value: float) -> str:
    """A number as text: three significant digits, from 1,000 on whole with commas; a dash (HTML) for nan."""
    return "&ndash;" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(caption: str, head: Iterable[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table in its own scrolling box. The first cell heads its row, those from `words` on hold numbers."""
    cells = lambda row: "".join(f"<td{' class=num' if k >= words else ''}>{c}</td>" for k, c in enumerate(row[1:], 1))
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{cells(row)}</tr>\n' for row in rows)
    return (f'<div class="box" role="region" tabindex="0" aria-label="{caption}"><table><caption><span>{caption}</span>'
            f'</caption>\n<thead><tr>{"".join(f"<th scope=col>{h}</th>" for h in head)}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>\n")


def folded(summary: str, body: str, state: str = "") -> str:
    """A part that unfolds. `state`: "open", or "long" for what print leaves out. Another state raises KeyError."""
    start = {"": "<details>", "open": "<details open>", "long": '<details class="long">'}[state]
    return f"{start}<summary>{summary}</summary>{body}</details>\n"


# ---- 2. Chart and timeline --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Series:
    """A named line of a chart. Where a point's y is not finite the line has a gap, where low is not it has no interval."""
    name: str
    points: list[tuple[float, float, float, float]]         # x, y, low, high
    bars: bool = False                                      # intervals as bars, else as a band
    line: bool = True


MARKERS = ('<circle cx="{x}" cy="{y}" r="{r}"/>', '<path d="M{x} {y}m-{r}-{r}h{d}v{d}h-{d}z"/>',
           '<path d="M{x} {y}m0-{r}l{r} {d}h-{d}z"/>', '<path d="M{x} {y}m0-{d}l{r} {d}l-{r} {d}l-{r}-{d}z"/>')


def marker(style: int, x: float, y: float, r: float = 2) -> str:
    """One of four shapes, by `style` modulo 4, centred at (x, y), of radius r, in SVG units."""
    return MARKERS[style % len(MARKERS)].format(x=f"{x:.1f}", y=f"{y:.1f}", r=r, d=2 * r)


def finite(value: float) -> bool:
    """Whether a chart can show a value: neither nan nor 1e15 and more in size."""
    return abs(value) < 1e15                # nan is not, and what is larger would only flatten a chart


def runs(items: Iterable[Any], holds: Callable[[Any], bool]) -> list[list[Any]]:
    """The unbroken stretches of items for which something holds."""
    return [list(stretch) for there, stretch in itertools.groupby(items, key=holds) if there]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that span low to high, in `most` steps or one more.

    >>> ticks(0, 0.37)
    [0.0, 0.1, 0.2, 0.3, 0.4]
    """
    span = max(high - low, 1e-9)
    unit = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * unit for m in (1, 2, 5, 10) if span / (m * unit) <= most + 1e-9)
    return [round(k * step, 12) for k in range(math.floor(low / step), math.ceil((low + span) / step - 1e-9) + 1)]


LEFT, RIGHT, TOP = 42, 350, 34                              # of the plot, in SVG units


def across(x_range: tuple[float, float], right: float = RIGHT) -> Callable[[float], float]:
    """Where a value stands on the horizontal axis, in SVG units. At either end half of one is left free, or a fortieth of all."""
    free = max(0.5, (x_range[1] - x_range[0]) / 40)
    return lambda v: LEFT + (right - LEFT) * (v - x_range[0] + free) / (x_range[1] - x_range[0] + 2 * free)


def x_axis(at_x: Callable[[float], float], x_range: tuple[float, float], bottom: float, unit: str) -> list[str]:
    """Whole numbers below the plot, fewer where they are long, and what they count."""
    numbers = ticks(x_range[0], max(x_range[1], x_range[0] + 1), 8 if x_range[1] < 10000 else 4)
    return [f'<text x="{at_x(t):.1f}" y="{bottom + 13}" text-anchor="middle">{number(t)}</text>'
            for t in numbers if t == int(t) and x_range[0] <= t <= x_range[1]] + [
            f'<text x="{RIGHT}" y="{bottom + 26}" text-anchor="end">{unit}</text>']


def mark_lines(at_x: Callable[[float], float], marks: Iterable[tuple[float, str]], bottom: float) -> list[str]:
    """Labelled vertical lines; a label that would touch the last goes on the other line."""
    out, lane, free = [], 0, 0.0
    for x, label in sorted((at_x(x), label) for x, label in marks):
        lane, flip = (0 if x >= free else 1 - lane), x + 6 * len(label) > RIGHT + 8
        free = max(free, x + 6 * len(label) + 8)
        out.append(f'<path class="mark" d="M{x:.1f} {4 + 13 * lane}V{bottom}"/><text class="tag" y="{12 + 13 * lane}" '
                   f'x="{x + (-3 if flip else 3):.1f}"{" text-anchor=end" * flip}>{label}</text>')
    return out


def swatch(style: int, name: str, line: bool = True) -> str:
    """An entry of a legend."""
    return (f'<li><svg class="swatch {tone(style)}" viewBox="0 0 30 12" aria-hidden="true">'
            f'{"<path class=line d=M1,6H29 />" * line}{marker(style, 15, 6, r=3)}</svg>{name}</li>')


def tone(style: int) -> str:
    """The classes of a style: four colours with their dashes, and from the fifth on the same with hollow markers."""
    return f"s{style % 4}" + " hollow" * (style >= 4)


def figure(name: str, title: str, what: str, height: float, drawing: Iterable[str], legend: Sequence[str], words: str,
           level: str = "h3", kind: str = "plot") -> str:
    """A drawing 360 units wide, so that a phone shows its text at full size, with its legend and the same in words. `kind` is its
    class."""
    return (f'<figure class="{kind}"><{level}>{title}</{level}>\n<svg class="chart" viewBox="0 0 360 {height:g}" role="img" '
            f'aria-labelledby="{name}t {name}d"><title id="{name}t">{title}</title><desc id="{name}d">{what}. '
            f'The caption has the main values.</desc>\n{"".join(drawing)}</svg>\n'
            f'{"".join(["<ul class=legend>", *legend, "</ul>"]) if legend else ""}\n'
            f"<figcaption>{words}</figcaption></figure>\n")


def chart(name: str, title: str, what: str, series: Sequence[Series], marks: Iterable[tuple[float, str]],
          x_range: tuple[float, float], *, y: tuple[float, float] | None = None, height: int = 200,
          level: str = "h3", unit: str = "iteration") -> str:
    """A figure of series over iterations, or what `unit` names. `name` is its id, `marks` are labelled vertical lines.

    Series differ in colour, dash and marker. `marks` are (iteration, label); `y` is the axis's range, else that of the values
    and 0.
    """
    drawn = [(k, s, [p for p in s.points if finite(p[1])]) for k, s in enumerate(series)]
    drawn = [item for item in drawn if item[2]]
    if not drawn:
        return f"<figure><{level}>{title}</{level}><p>No finite value in this run.</p></figure>\n"
    ends = [0.0, *(v for _, _, points in drawn for p in points for v in p[1:] if finite(v))]
    y_ticks = ticks(*(y or (min(ends), max(ends) if any(ends) else 1)), most=5 if height > 150 else 2)
    bottom, low, high, at_x = height - 30, y_ticks[0], y_ticks[-1], across(x_range)
    at_y = lambda v: bottom - (bottom - TOP) * (min(max(v, low), high) - low) / (high - low)
    path = lambda spots: " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
    out = [f'<path class="grid" d="M{LEFT} {at_y(t):.1f}H{RIGHT}"/><text x="{LEFT - 5}" y="{at_y(t) + 3.5:.1f}" '
           f'text-anchor="end">{number(t)}</text>' for t in y_ticks]
    out += x_axis(at_x, x_range, bottom, unit) + mark_lines(at_x, marks, bottom)
    words = []
    for k, s, points in drawn:
        shift = 4 * (k - (len(series) - 1) / 2) * s.bars    # bars of one iteration stand side by side
        spot = lambda p: (at_x(p[0]) + shift, at_y(p[1]))
        out.append(f'<g class="{tone(k)}">')
        if s.bars:
            out += [f'<path class="bar" d="M{spot(p)[0]:.1f} {at_y(p[2]):.1f}V{at_y(p[3]):.1f}"/>'
                    for p in points if finite(p[2])]
        for part in runs(s.points, lambda p: not s.bars and finite(p[1]) and finite(p[2])):
            edge = [(p[0], p[3]) for p in part] + [(p[0], p[2]) for p in reversed(part)]
            out.append(f'<polygon class="band" points="{path((at_x(a), at_y(b)) for a, b in edge)}"/>')
        for part in runs(s.points, lambda p: s.line and finite(p[1])):
            out.append(f'<polyline class="line" points="{path(map(spot, part))}"/>')
        out += [f"<g><title>{s.name}, {unit} {number(p[0])}: {number(p[1])}</title>{marker(k, *spot(p))}</g>" for p in points]
        out.append("</g>")
        values = [p[1] for p in points]
        words.append(f"{s.name}: {number(values[0])} at {unit} {number(points[0][0])}" + (
            f", {number(values[-1])} at {number(points[-1][0])}; lowest {number(min(values))}, highest {number(max(values))}"
            if len(points) > 1 else ""))
    return figure(name, title, what, height, out, [swatch(k, s.name, s.line) for k, s, _ in drawn] if len(series) > 1 else [],
                  f"{f'{what}. ' if level == 'h3' else ''}{'. '.join(words)}.", level)


@dataclasses.dataclass
class Life:
    """A row of a timeline: stretches of (start, end, style), a label to the left, one to the right, and a name in full."""
    tag: str
    value: str
    name: str
    stretches: list[tuple[float, float, int]]


def timeline(name: str, title: str, what: str, lives: Sequence[Life], styles: Sequence[str], head: str,
             marks: Iterable[tuple[float, str]], x_range: tuple[float, float]) -> str:
    """A figure with a row for each life: every stretch begins with a marker, and one without length is the marker alone.
    `styles` are the names of the styles of stretches, `head` is what the labels to the right are."""
    row, end = 14, RIGHT - 32
    bottom, at_x = TOP + row * len(lives), across(x_range, end)
    out = [f'<text x="{RIGHT + 8}" y="{TOP - 6}" text-anchor="end">{head}</text>']
    out += x_axis(at_x, x_range, bottom, "iteration") + mark_lines(at_x, marks, bottom)
    for place, life in enumerate(lives):
        y = TOP + row * (place + 0.5)
        out.append(f'<g><title>{life.name}</title><path class="grid" d="M{LEFT} {y + row / 2:g}H{RIGHT + 8}"/>'
                   f'<text x="{LEFT - 8}" y="{y + 3.5:g}" text-anchor="end">{life.tag}</text>'
                   f'<text class="tag" x="{RIGHT + 8}" y="{y + 3.5:g}" text-anchor="end">{life.value}</text>')
        out += [f'<g class="{tone(style)}"><path class="line" d="M{at_x(a):.1f} {y:g}H{at_x(b):.1f}"/>'
                f"{marker(style, at_x(a), y, r=3)}</g>" for a, b, style in life.stretches]
        out.append("</g>")
    return figure(name, title, what, bottom + 30, out, [swatch(k, style) for k, style in enumerate(styles)], f"{what}.",
                  kind="lives")


# ---- 3. The style --------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --dim: #57606a; --rule: #d0d7de; --card: #f6f8fa;
  --s0: #0a58ad; --s1: #a84300; --s2: #1a7040; --s3: #86309b; --blue: 10 98 200; --orange: 214 96 0; }
@media screen and (prefers-color-scheme: dark) { :root { --bg: #11151a; --fg: #e6e9ed; --dim: #a5afba; --rule: #39424d;
  --card: #1a2027; --s0: #7ab8ff; --s1: #ffab66; --s2: #6fd696; --s3: #dd9dee; --blue: 70 150 255; --orange: 255 140 40; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1240px; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h3, h4 { font-size: 1rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .75rem; border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; padding: .5rem 0; } summary h3 { display: inline; }
a { color: var(--s0); } nav { margin-top: .75rem; } nav a { display: inline-block; padding: .25rem .75rem .25rem 0; }
small, figcaption, .worth, dt { color: var(--dim); font-size: .85rem; } dd { margin: 0; }
.notice { border-left: 4px solid var(--s1); padding: .25rem .75rem; background: var(--card); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .5rem 1rem; margin: 0; }
.grid3, .grid2 { display: grid; gap: 1.25rem; align-items: start; }
.grid3 { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.grid2 { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; min-width: 0; } .chart { width: 100%; height: auto; display: block; }
.chart text { font: 10.5px system-ui, sans-serif; fill: var(--dim); } .chart .tag { fill: var(--fg); }
.grid { stroke: var(--rule); stroke-width: .7; } .mark { stroke: var(--dim); stroke-width: .8; stroke-dasharray: 2 2; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); --dash: 6 3; } .s2 { --c: var(--s2); --dash: 2 2; }
.s3 { --c: var(--s3); --dash: 8 3 2 3; } g[class], .swatch { fill: var(--c); }
.band { fill-opacity: .2; stroke: var(--c); stroke-opacity: .2; }
.line, .bar { fill: none; stroke: var(--c); stroke-width: 1.6; } .line { stroke-dasharray: var(--dash, none); }
.hollow circle, .hollow path:not(.line, .bar, .mark) { fill: var(--bg); stroke: var(--c); }
.lives { max-width: 560px; } .lives .line { stroke-dasharray: none; } .lives .s1 .line { stroke-width: 5; }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; }
.swatch { width: 30px; height: 12px; margin-right: .4rem; }
.box { overflow-x: auto; margin: .75rem 0; overflow-wrap: normal; } table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2rem); }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { border-bottom-width: 2px; } tbody th { font-weight: 500; }
.num { white-space: nowrap; font-variant-numeric: tabular-nums; }
article { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .75rem; min-width: 0; }
article p { margin: .25rem 0; } .skill { font-weight: 600; }
.state { border: 1px solid var(--dim); border-radius: 4px; padding: 0 .35rem; }
ol { list-style: none; padding: 0; margin: .5rem 0 0; } ol li { border-top: 1px solid var(--rule); padding: .5rem 0; }
.seen, pre { white-space: pre-wrap; font-size: .85rem; } .seen { color: var(--dim); }
.said { white-space: pre-wrap; font: .9rem/2 ui-monospace, monospace; }
.said b { border-bottom: calc(1px + 4px * var(--w)) solid var(--s3); }
.pos, .neg { padding: .15rem 0; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.pos { background: rgb(var(--blue) / calc(.04 + .22 * var(--a))); }
.neg { background: rgb(var(--orange) / calc(.04 + .24 * var(--a))); }
:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
@media print { @page { margin: 14mm; } * { print-color-adjust: exact; } body { padding: 0; max-width: none; font-size: 10pt; }
  nav, .long { display: none; } details::details-content { content-visibility: visible; height: auto; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .4rem; } tbody th { overflow-wrap: anywhere; }
  .box { overflow: visible; } .num { white-space: normal; }
  figure, .grid3 article, tr, ol li { break-inside: avoid; } h2, h3, h4, summary, caption { break-after: avoid; }
  .grid3, .grid2 { grid-template-columns: repeat(auto-fit, minmax(45%, 1fr)); } }
"""
