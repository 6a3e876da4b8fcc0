"""A sweep's results as a table, as JSON and as a plot, with the lines through them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from seer_scale.evaluate.suite import Item
from seer_scale.files import shown, write_whole
from seer_scale.formatting import counted, paragraph, plus_minus, short_number
from seer_scale.sweep.fit import Prediction, Scaling, scaling
from seer_scale.sweep.results import Result, Score, name_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one size on one number of images, a seed each."""

    results: Sequence[Result]

    @property
    def first(self) -> Result:
        return self.results[0]

    def figure(self, score: str) -> str:
        """The mean over seeds, with its deviation over these or, of one seed, the standard error that the test images
        leave."""
        found = [r.scores[score] for r in self.results if score in r.scores]
        if not found:
            return "-"
        values = [s.value for s in found]
        around = plus_minus(None, stdev(values)) if len(values) > 1 else plus_minus(found[0].stderr)
        of = f" ({len(values)} of {len(self.results)} runs)" if len(values) < len(self.results) else ""
        return f"{fmean(values):.2f}{around}{of}"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What accuracy is plotted against. group: the runs that share a line."""

    name: str
    unit: str
    x: Callable[[Result], float]
    group: Callable[[Result], Any]


AXES = (
    Axis(name="parameters", unit="", x=lambda r: r.point.parameters, group=lambda r: r.point.images),
    Axis(name="compute", unit=" FLOP", x=lambda r: r.point.compute, group=lambda r: r.point.images),
    Axis(name="images", unit="", x=lambda r: r.images, group=lambda r: r.point.size),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One score against one axis, of the runs of one group. measured_stderr: of the mean at the largest size, over its
    runs or, of one, over test images."""

    score: str
    axis: Axis
    group: str
    points: Sequence[tuple[float, float]]
    scaling: Scaling
    measured_stderr: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "score": self.score, "axis": self.axis.name, "group": self.group, "points": list(self.points),
            "measured_stderr": self.measured_stderr,
            **self.scaling.to_dict(),
        }  # fmt: skip


def rows_of(results: Sequence[Result]) -> list[Row]:
    """results: in the order of `points_of`."""
    groups = groupby(results, key=lambda r: (r.point.parameters, r.point.size, r.point.images))
    return [Row(results=list(runs)) for _, runs in groups]


def curves_of(results: Sequence[Result], scores: Sequence[str]) -> list[Curve]:
    """Those with two sizes at least that were measured."""
    found = []
    for axis in AXES:
        for group in dict.fromkeys(axis.group(r) for r in results):
            for score in scores:
                runs = [r for r in results if axis.group(r) == group]
                done = [r for r in runs if score in r.scores]
                points = [(float(axis.x(r)), r.scores[score].value) for r in done]
                planned = [float(axis.x(r)) for r in runs if score not in r.scores]
                if made := scaling([x for x, _ in points], [y for _, y in points], planned):
                    name = counted(group, "image") if isinstance(group, int) else group
                    largest = [r.scores[score] for r in done if axis.x(r) == max(x for x, _ in points)]
                    several = len({axis.group(r) for r in results}) > 1
                    curve = Curve(
                        score=score, axis=axis, group=name if several else "", points=points, scaling=made,
                        measured_stderr=_stderr_of_mean(largest),
                    )  # fmt: skip
                    found.append(curve)
    return found


def _stderr_of_mean(scores: Sequence[Score]) -> float | None:
    if len(scores) == 1:
        return scores[0].stderr
    return stdev(s.value for s in scores) / math.sqrt(len(scores))


def to_dict(results: Sequence[Result], items: Sequence[Item], equal: str) -> dict[str, Any]:
    """What sweep.json holds."""
    points = [
        {
            "name": r.point.name, "size": r.point.size, "seed": r.point.seed, "run": str(r.point.run_dir),
            "parameters": r.point.parameters, "macs": r.point.macs, "compute": r.point.compute,
            "samples": r.point.samples, "samples_seen": r.samples_seen, "images": r.images or None,
            "epochs": r.epochs, "training": r.training and r.training.job_id,
            "evaluation": r.evaluation and r.evaluation.job_id,
            "scores": {name: asdict(s) for name, s in r.scores.items()},
        }
        for r in results
    ]  # fmt: skip
    missing = {r.point.name: lack for r in results if (lack := r.lacks(items))}
    curves = [curve.to_dict() for curve in curves_of(results, list(map(name_of, items)))]
    return {"equal": equal, "points": points, "curves": curves, "missing": missing}


def as_text(results: Sequence[Result], items: Sequence[Item], width: int = 0) -> str:
    """For people. width: of paragraphs in columns, the terminal's otherwise."""
    scores = list(map(name_of, items))
    lines = [("size", "parameters", "MACs an image", "samples", "images", "epochs", "FLOP", "seeds", *scores)]
    for row in rows_of(results):
        first, point = row.first, row.first.point
        lines.append(
            (
                shown(point.size), short_number(point.parameters), _amount(point.macs), f"{point.samples:,}",
                f"{first.images:,}" if first.images else "all", f"{first.epochs:.3g}" if first.epochs else "",
                f"{point.compute:.2e}", str(len(row.results)), *map(row.figure, scores),
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip() for line in lines]
    text += [paragraph(said, width) for curve in curves_of(results, scores) for said in _said(curve)]
    lacking: dict[str, list[str]] = {}
    for result in results:
        lacking.setdefault(result.lacks(items), []).append(shown(result.point.name))
    lacking.pop("", None)
    text += [paragraph(f"Missing ({lack}): {', '.join(names)}", width) for lack, names in lacking.items()]
    return "\n".join(text)


def _said(curve: Curve) -> Iterator[str]:
    """A line's values, and what it predicts."""
    line, axis = curve.scaling.line, curve.axis
    a, b = (f"{v:.2f}{plus_minus(e)}" for v, e in ((line.a, line.a_stderr), (line.b, line.b_stderr)))
    of = f" of {curve.group}" if curve.group else ""
    said = f"{curve.score}{of} = {a} + ({b}) log10({axis.name}), {counted(line.runs, 'run')} at {line.sizes} sizes."
    if held := curve.scaling.held:
        assert held.measured is not None, "the largest size was measured"
        measured = f"{held.measured:.2f}{plus_minus(curve.measured_stderr)}"
        said += (
            f" Without the largest, {_predicted(held, axis)} is predicted there, and {measured} was measured "
            f"({held.measured - held.predicted:+.2f})."
        )
    yield f"{said} The next: {_predicted(curve.scaling.next, axis)}."


def _predicted(made: Prediction, axis: Axis) -> str:
    return f"{made.predicted:.2f}{plus_minus(made.stderr)} at {_amount(made.x)}{axis.unit or f' {axis.name}'}"


def _amount(x: float) -> str:
    return short_number(x) if x < 1e12 else f"{x:.2e}"


# ------------------------------------------------------------------------------------------------ the plot


def draw(results: Sequence[Result], scores: Sequence[str], path: Path) -> bool:
    """A panel for each axis with a curve, as SVG: the runs, their line, and as a cross what the line of the smaller
    sizes predicts of the largest; whether there was one. Raises OSError."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves = curves_of(results, scores)
    axes = [axis for axis in AXES if any(curve.axis is axis for curve in curves)]
    if not axes:
        return False
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep"}):  # small, and the same of the same results
        figure = Figure(figsize=(4.8 * len(axes), 3.6), layout="constrained")
        for i, axis in enumerate(axes):
            panel = figure.add_subplot(1, len(axes), i + 1)
            for n, curve in enumerate(c for c in curves if c.axis is axis):
                colour, label = f"C{n}", " ".join(filter(None, (curve.score, curve.group)))
                panel.plot(*zip(*curve.points), "o", color=colour, markersize=3.5, label=label)
                ends = min(x for x, _ in curve.points), curve.scaling.next.x
                panel.plot(ends, [curve.scaling.line.at(x)[0] for x in ends], "--", color=colour, linewidth=1)
                for made, mark in ((curve.scaling.held, "x"), (curve.scaling.next, "D")):
                    if made:
                        panel.errorbar(
                            [made.x], [made.predicted], [made.stderr or math.nan], fmt=mark, color=colour,
                            markersize=5, markerfacecolor="none", capsize=2, linewidth=0.8,
                        )  # fmt: skip
            panel.set_xscale("log")
            panel.minorticks_off()  # each is a mark of its own in the file
            panel.set(xlabel=f"{axis.name}{f' ({axis.unit.strip()})' * bool(axis.unit)}", ylabel="accuracy, %")
            panel.grid(alpha=0.3)
            panel.legend(frameon=False, fontsize="small")
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    write_whole(path, out.getvalue())
    return True
