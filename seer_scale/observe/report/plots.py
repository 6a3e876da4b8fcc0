"""Curves of a report, as inline SVG: drawn by matplotlib in the page's colours, with the values under the pointer.

Every plot is drawn twice, wide and narrow, and the style sheet shows the one that fits; colours are variables of the
style sheet, so that they follow the reader's light or dark mode. Nothing here is a script: a value shows as the title
of a strip of the plot.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import zlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seer_scale.formatting import short_number
from seer_scale.observe.chart import Chart

if TYPE_CHECKING:  # a name that older versions lack
    from matplotlib.typing import RcKeyType

Rows = list[dict[str, Any]]

COLOURS = {
    "blue": "#3367b1",
    "orange": "#c8702b",
    "green": "#2b8a5e",
    "ink": "#3b4049",
    "faint": "#d9dce2",
    "grid": "#eef0f4",
    "red": "#bf4043",
    "purple": "#7b57b8",
    "teal": "#1f8f9e",
    "pink": "#c2559a",
    "olive": "#8a8127",
}
"""Stand-ins, which no other colour of matplotlib's equals, for the style sheet's variables of the same names."""
BLUE, ORANGE, GREEN, INK, FAINT, GRID, RED, PURPLE, TEAL, PINK, OLIVE = COLOURS.values()
MAX_POINTS = 1200
"""Of a curve; more would only make the page heavier."""
MAX_STRIPS = 80
"""Places of a plot that show their value under the pointer."""
SIZES = {"wide": (10.4, 3.5), "narrow": (5.1, 3.3)}

STYLE: dict[RcKeyType, str | float | bool] = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # the reader's system font, by the style sheet
    "svg.hashsalt": "seer",
    "figure.dpi": 72,  # a display unit is a point of the SVG
}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Curve:
    """Values over images seen: x [N], y [N] (not finite leaves a gap), and `spread` [N] above and below, where
    known."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    digits: str = ".3g"
    unit: str = ""
    smooth: bool = False
    spread: Sequence[float] | None = None
    ends: bool = False
    """Whether its first and last value are written beside it."""
    gaps: Sequence[int] = ()
    """Numbers of points that nothing joins with the point before."""
    style: str = "-"
    """Of the line, as matplotlib writes it."""

    @property
    def is_drawn(self) -> bool:
        return any(map(math.isfinite, self.y))


@dataclass
class Plot:
    """What stands in one plot. limits: of the vertical axis, where the data do not say. level: a dashed line and its
    words. breaks: restarts, in images seen. until: where the horizontal axis ends. bars: filled down to 0, in steps.
    legend: whether several curves are named."""

    curves: list[Curve]
    unit: str = ""
    along: str = "images seen"
    limits: tuple[float | None, float | None] = (None, None)
    level: tuple[float, str] | None = None
    breaks: Sequence[float] = ()
    until: float = 0.0
    draw: Callable[[Axes], None] | None = None
    bars: bool = False
    legend: bool = True

    def __post_init__(self) -> None:
        self.curves = [c for c in self.curves if c.is_drawn]


def metric(
    rows: Rows, key: str, name: str, colour: str, *, scale: float = 1.0, digits: str = ".3g", unit: str = "",
    smooth: bool = False, spread: str = "", ends: bool = False, apart: str = "", along: str = "samples_seen",
    max_points: int = MAX_POINTS, style: str = "-",
) -> Curve:  # fmt: skip
    """A metric of the log as a curve over the field `along` of its rows, thinned to `max_points`; its last value stays.
    apart: a field of the rows; where its value changes, the curve has a gap."""
    some = [r for r in rows if key in r and (is_number(r[key]) or r[key] is None) and is_number(r.get(along))]
    stride = -(-len(some) // max_points) or 1
    some = some[::stride] + (some[-1:] if (len(some) - 1) % stride else [])
    y = [math.nan if r[key] is None else scale * r[key] for r in some]
    around = [scale * r[spread] if is_number(r.get(spread)) else 0.0 for r in some] if spread else None
    marks: list[str | None] = list(accumulate((r.get(apart) for r in some), lambda before, now: now or before))
    gaps = [i for i in range(1, len(marks)) if marks[i - 1] and marks[i - 1] != marks[i]]
    return Curve(name, colour, [r[along] for r in some], y, digits, unit, smooth, around, ends, gaps, style)


def smoothed(x: Sequence[float], y: Sequence[float], breaks: Sequence[float], share: float = 0.02) -> list[float]:
    """Mean over a window of `share` of the curve, centred: narrower towards the ends, so that it begins and ends on the
    data, and never across a restart. Values that are not finite are left out."""
    half, out = max(1, round(len(y) * share / 2)), []
    edges = sorted({0, len(y), *(sum(a <= b for a in x) for b in breaks)})
    for first, end in zip(edges, edges[1:]):
        for i in range(first, end):
            reach = min(half, i - first, end - 1 - i)
            window = [v for v in y[i - reach : i + reach + 1] if math.isfinite(v)]
            out.append(statistics.fmean(window) if window else math.nan)
    return out


def svg(plot: Plot) -> Markup:
    """The plot in both sizes, or "" when there is nothing to draw."""
    if not plot.curves and not plot.draw:
        return Markup()
    return Markup("".join(_one(plot, size) for size in SIZES))


def _one(plot: Plot, size: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZES[size], layout="constrained")
        ax = figure.subplots()
        ax.margins(x=0.02)
        if plot.until:
            ax.set_xlim(-0.02 * plot.until, 1.02 * plot.until)
        for curve in plot.curves:
            if plot.bars:
                ax.fill_between(curve.x, curve.y, step="mid", color=curve.colour, alpha=0.75, linewidth=0)
            else:
                _draw(ax, curve, plot.breaks)
                if curve.ends:
                    _write_ends(ax, curve, plot.level[0] if plot.level else None)
        if plot.draw:
            plot.draw(ax)
        ax.margins(y=0.08)
        ax.autoscale_view(scalex=False)
        ax.set_ylim(*plot.limits)
        if plot.level:
            _level(ax, *plot.level)
        for place in plot.breaks:
            ax.axvline(place, color=INK, alpha=0.5, linestyle=":", linewidth=1.1, zorder=0)
        ax.set_xlabel(plot.along)
        ax.set_ylabel(plot.unit)
        ax.xaxis.set_major_formatter(FuncFormatter(short_number))
        ax.xaxis.set_major_locator(MaxNLocator(6 if size == "wide" else 4))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.tick_params(length=0)
        if plot.legend and len(plot.curves) > 1:
            ax.legend(frameon=False, fontsize=9.5, loc="best")
        text = _saved(figure)
        strips = _strips(ax, plot, 72 * SIZES[size][1])
    return _of_page(text, size, strips)


def chart_svg(chart: Chart, key: str) -> Markup:
    """A chart in both sizes, in the page's colours. key: tells it from one that is the same on this page."""
    return Markup("".join(_one_chart(chart, size, key) for size in SIZES))


def _one_chart(chart: Chart, size: str, key: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZES[size], layout="constrained")
        ax = figure.subplots()
        chart.draw(ax, (BLUE, ORANGE, GREEN, INK))
        ax.tick_params(length=0)
        return _of_page(_saved(figure), size, "", key)


def _saved(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _of_page(text: str, size: str, strips: str, key: str = "") -> str:
    """matplotlib's SVG as part of a page: without what only a file needs, in variables of the style sheet. key: tells
    it from another of the same text."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"| xmlns(:\w+)?="[^"]*"', "", text, count=4)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    # ids are the page's, not the picture's: those that nothing refers to go, the others are this picture's alone
    used, own = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)), f"p{zlib.crc32((key + text).encode()):x}-"
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{own}", text)
    text = text.replace("<svg", f"<svg class={size} role=img", 1)
    return text[: text.rindex("</svg>")] + strips + "</svg>"


def _draw(ax: Axes, curve: Curve, breaks: Sequence[float]) -> None:
    y = list(curve.y)
    if curve.smooth and len(y) > 20:
        ax.plot(curve.x, y, color=curve.colour, alpha=0.3, linewidth=0.9)
        y = smoothed(curve.x, y, breaks)
    edges = [0, *curve.gaps, len(y)]
    for begin, end in zip(edges, edges[1:]):
        x, values = curve.x[begin:end], y[begin:end]
        label = curve.name if begin == 0 else None
        marker = "o" if len(y) < 20 else None
        ax.plot(x, values, curve.style, color=curve.colour, marker=marker, markersize=4.5, label=label)
        if curve.spread and len(values) > 1:
            low, high = ([v + sign * s for v, s in zip(values, curve.spread[begin:end])] for sign in (-1, 1))
            ax.fill_between(x, low, high, color=curve.colour, alpha=0.18, linewidth=0)
    if curve.spread:
        ax.errorbar(curve.x, y, curve.spread, fmt="none", color=curve.colour, elinewidth=1.2, capsize=3)


def _write_ends(ax: Axes, curve: Curve, level: float | None) -> None:
    """The first value and the last, beyond their error bars: below and above the curve, or where the level is not."""
    spread = curve.spread or [0.0] * len(curve.y)
    drawn = [p for p in zip(curve.x, curve.y, spread) if math.isfinite(p[1])]
    for (x, y, around), side, rises in zip(drawn[:1] + drawn[1:][-1:], ("left", "right"), (False, True)):
        is_above = rises if level is None else y >= level
        sign = 1 if is_above else -1
        ax.annotate(
            f"{y:{curve.digits}} {curve.unit}", (x, y + sign * around), xytext=(4 if side == "left" else 0, 5 * sign),
            textcoords="offset points", ha=side, va="bottom" if is_above else "top", weight="bold",
        )  # fmt: skip


def _level(ax: Axes, y: float, text: str) -> None:
    ax.axhline(y, color=INK, linestyle=(0, (5, 4)), linewidth=1)
    ax.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(-2, 4), textcoords="offset points", ha="right"
    )


def _strips(ax: Axes, plot: Plot, height: float) -> str:
    """Over the plot, a strip a value: pointing at one shows the value and marks its place."""
    if not plot.curves:
        return ""
    left, right = ax.bbox.x0, ax.bbox.x1
    places: list[tuple[float, float]] = []  # values of x, and where they are drawn
    every = sorted({x for c in plot.curves for x in c.x})
    for x, here in zip(every, ax.transData.transform([(x, 0) for x in every])[:, 0]):
        if not places or here - places[-1][1] >= (right - left) / MAX_STRIPS:
            places.append((x, here))
    edges = [left, *((a + b) / 2 for (_, a), (_, b) in zip(places, places[1:])), right]
    nearest = [_nearest(c.x, [x for x, _ in places]) for c in plot.curves]
    out = []
    for number, ((x, _), begin, end) in enumerate(zip(places, edges, edges[1:])):
        known = [(c, near[number]) for c, near in zip(plot.curves, nearest) if number in near]
        said = "\n".join(f"{c.name}: {_value(c, i)}" for c, i in known)
        dots = ""
        for c, i in known:
            if math.isfinite(c.y[i]):
                at, up = ax.transData.transform((c.x[i], c.y[i]))
                dots += f'<circle cx="{at:.1f}" cy="{height - up:.1f}" r="4" style="fill:{c.colour}"/>'
        about = "about " * any(c.x[i] != x for c, i in known)
        out.append(
            f'<g><title>{escape(said)}\n{about}{_number(x)} {escape(plot.along)}</title><rect x="{begin:.1f}" '
            f'y="{height - ax.bbox.y1:.1f}" width="{end - begin:.1f}" height="{ax.bbox.height:.1f}"/>{dots}</g>'
        )
    text = "".join(out)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return f"<g class=values>{text}</g>"


def _nearest(x: Sequence[float], places: Sequence[float]) -> dict[int, int]:
    """Number of a place -> that of the nearest of the points at `x`, for which no other place is nearer."""
    found: dict[int, int] = {}
    for i, value in enumerate(x):
        after = min(bisect_left(places, value), len(places) - 1)
        place = min((max(0, after - 1), after), key=lambda p: abs(places[p] - value))
        if place not in found or abs(value - places[place]) < abs(x[found[place]] - places[place]):
            found[place] = i
    return found


def _number(x: float) -> str:
    """A place on the horizontal axis: to the unit what is counted, to four digits what is measured."""
    return f"{x:,}" if isinstance(x, int) else f"{x:.4g}"


def _value(curve: Curve, i: int) -> str:
    y, spread = curve.y[i], curve.spread[i] if curve.spread else 0
    if not math.isfinite(y):
        return "not finite"
    return f"{y:{curve.digits}}" + (f" ± {spread:{curve.digits}}" if spread else "") + f" {curve.unit}".rstrip()
