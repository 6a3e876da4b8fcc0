"""A task's plot as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from seer_scale.files import write_whole
from seer_scale.observe.chart import Chart


def draw(chart: Chart, path: Path) -> None:
    """Write it as SVG. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    chart.draw(axes)
    axes.set_title(chart.title)
    axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    write_whole(path, out.getvalue())
