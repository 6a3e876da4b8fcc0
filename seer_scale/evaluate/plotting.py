"""A task's plot as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from seer_scale.evaluate.task import Plot
from seer_scale.files import write_whole


def draw(plot: Plot, path: Path) -> None:
    """Write a plot as SVG."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    if plot.kind == "bars":
        names = list(dict.fromkeys(x for points in plot.series.values() for x, _ in points))
        width = 0.8 / max(1, len(plot.series))
        for i, (name, points) in enumerate(plot.series.items()):
            places = [names.index(x) - 0.4 + (i + 0.5) * width for x, _ in points]
            axes.bar(places, [y for _, y in points], width, label=name)
        axes.set_xticks(range(len(names)), [str(n) for n in names], rotation=30 if len(names) > 6 else 0, ha="right")
    else:
        for name, points in plot.series.items():
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, "o" if plot.kind == "points" else "o-", ms=3, label=name)
        if plot.log_x:
            axes.set_xscale("log")
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(alpha=0.3)
    if len(plot.series) > 1:
        axes.legend(frameon=False, fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    write_whole(path, out.getvalue())
