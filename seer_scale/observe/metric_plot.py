"""What a method brings to the report, as data: it is kept in the run's log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricPlot:
    """key: of the metric lines. name: of the curve. scale: what a value is multiplied by, to be of `unit`. limits: of
    the axis."""

    title: str
    caption: str
    key: str
    name: str
    unit: str = ""
    scale: float = 1.0
    limits: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class ReportSection:
    """A section of its own: a note of a few sentences, plots, and strips of pictures. pictures: the name under which
    `Gallery.add_strip` keeps them, if there are any."""

    title: str
    note: str
    plots: tuple[MetricPlot, ...] = ()
    pictures: str = ""
