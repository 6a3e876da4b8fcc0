"""A plot as data, kept as JSON beside the figures it shows, and how it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines, bars or points: series name -> (x, y) pairs; of bars x is a name. x, y: what the axes say."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[Any, float]]]
    kind: Literal["lines", "bars", "points"] = "lines"
    log_x: bool = False

    def draw(self, axes: Axes, colours: Sequence[str] | None = None) -> None:
        """On matplotlib's axes."""
        if colours:
            axes.set_prop_cycle(color=list(colours))
        if self.kind == "bars":
            self._draw_bars(axes)
        else:
            for name, points in self.series.items():
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.plot(xs, ys, "o" if self.kind == "points" else "o-", markersize=3.5, label=name)
            if self.log_x:
                axes.set_xscale("log")
        axes.set(xlabel=self.x, ylabel=self.y)
        if len(self.series) > 1:
            axes.legend(frameon=False, fontsize="small")

    def _draw_bars(self, axes: Axes) -> None:
        names = list(dict.fromkeys(str(x) for points in self.series.values() for x, _ in points))
        width = 0.8 / max(1, len(self.series))
        for i, (name, points) in enumerate(self.series.items()):
            places = [names.index(str(x)) - 0.4 + (i + 0.5) * width for x, _ in points]
            axes.bar(places, [y for _, y in points], width, label=name)
        turned = len(names) > 5
        axes.set_xticks(
            range(len(names)), names, rotation=35 if turned else 0, ha="right" if turned else "center", fontsize="small"
        )
