"""Several runs in one page: which keys of their recipes differ, where each stands, and their curves over images seen,
time and compute. The page is made as a report is (`page`, `plots`), from the same files of each run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from seer_scale.config import Config
from seer_scale.errors import Problem, UserError
from seer_scale.files import shown
from seer_scale.formatting import FLOP_UNITS, counted
from seer_scale.observe.metric_plot import MetricPlot
from seer_scale.observe.report.compared_run import (
    COMPUTE,
    LOSS_SHARE,
    RUNNING_S,
    ComparedRun,
    differing_keys,
    read_runs,
    standing,
    value_text,
)
from seer_scale.observe.report.evaluations import rows_of
from seer_scale.observe.report.figures import Figure, latest, loss_level, loss_limits
from seer_scale.observe.report.page import write_page
from seer_scale.observe.report.plots import (
    BLUE,
    COLOURS,
    GREEN,
    MAX_POINTS,
    OLIVE,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    TEAL,
    Curve,
    Plot,
    Rows,
    is_number,
    metric,
    svg,
)

DASHES = {"-": "none", "--": "7 4", ":": "2 3"}
"""Lines as matplotlib writes them, and as SVG does."""
RUN_LINES = [(colour, style) for style in DASHES for colour in (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, PINK, OLIVE)]
"""Of the runs, in order."""
BEGINS = b"<!doctype html>"
IMAGES = "samples_seen"
AXIS_UNITS = {RUNNING_S: ((3600.0, "hours"), (60.0, "minutes")), COMPUTE: FLOP_UNITS}

LOSS = MetricPlot("Loss", "Lower is better, and compares between runs of one method, batch and prototypes.", "loss", "")
SHARE_OF_LOSS = MetricPlot(
    "Loss relative to its baseline",
    "The loss divided by that of a network which has learned nothing, as these runs do not have the same: 1 is nothing "
    "learned.",
    LOSS_SHARE,
    "",
)
KNN = MetricPlot(
    "kNN top-1",
    "Held-out images classified by the vote of their nearest neighbours, with the standard error.",
    "knn/top1",
    "",
    "%",
)
PROBE = MetricPlot(
    "Linear probe", "Top-1 of the linear classifier beside the network, held-out images.", "probe/top1", "", "%"
)  # fmt: skip
HEALTH = (
    MetricPlot("Effective rank", "RankMe of the features.", "health/rankme", "", limits=(0, None)),
    MetricPlot("Effective rank of embeddings", "RankMe.", "health/rankme_embeddings", "", limits=(0, None)),
    MetricPlot("Alignment", "Squared distance of two views of an image, 0 at best.", "health/alignment", ""),
    MetricPlot("Uniformity", "How evenly images are spread, about -4 at best.", "health/uniformity", ""),
    MetricPlot("Norm of features", "Mean over images.", "health/feature_norm", "", limits=(0, None)),
)
OF_TRAINING = (
    MetricPlot("Learning rate", "As the schedules were applied.", "lr", "", limits=(0, None)),
    MetricPlot("Gradient norm", "Of all parameters together, before the update.", "grad_norm", "", limits=(0, None)),
    MetricPlot(
        "Throughput", "Images trained on each second, over all ranks.", "throughput/img_per_s", "", "images/s",
        limits=(0, None),
    ),
    MetricPlot("Waiting for images", "Share of an update's time.", "time/data_wait_frac", "", "%", 100, (0, 105)),
    MetricPlot("Peak memory", "The most a rank has held so far.", "mem/peak_gib", "", "GiB a rank", limits=(0, None)),
)  # fmt: skip
OWN_GROUPS = {"knn", "probe", "health", "throughput", "time", "mem", "data", "evaluation"}
"""Groups of metrics that no method brings."""


# --- curves


class Curves:
    """Draws metrics of all runs over one axis, which is a field of their rows."""

    def __init__(self, runs: Sequence[ComparedRun], axis: str):
        self.runs, self.axis = runs, axis
        most = max((r[axis] for run in runs for r in run.rows if is_number(r.get(axis))), default=0)
        units = AXIS_UNITS.get(axis, ((1, ""),))
        size, unit = next(((s, u) for s, u in units if most >= 2 * s), units[-1])
        self.along = {RUNNING_S: f"{unit} of running", COMPUTE: unit}.get(axis, "images seen")
        self.until = most / size
        self._rows = [self._on_axis(run.rows, size) for run in runs]

    def _on_axis(self, rows: Rows, size: float) -> Rows:
        return rows if size == 1 else [r | {self.axis: r[self.axis] / size} for r in rows if self.axis in r]

    def figure(self, plot: MetricPlot, *, wide: bool = False, smooth: bool = False) -> Figure | None:
        """None where no run has any of it."""
        points = max(200, 3 * MAX_POINTS // max(3, len(self.runs)))
        digits = ".1f" if plot.unit.startswith("%") else ".4g"
        curves = [
            metric(
                rows, plot.key, run.name, colour, scale=plot.scale, digits=digits, unit=plot.unit, smooth=smooth,
                spread=f"{plot.key}_stderr" * (plot in (KNN, PROBE)), apart=_measurement(plot.key), along=self.axis,
                max_points=points, style=style,
            )
            for run, rows, (colour, style) in zip(self.runs, self._rows, RUN_LINES)
        ]  # fmt: skip
        if not any(curve.is_drawn for curve in curves):
            return None
        without = [run.name for run, curve in zip(self.runs, curves) if not curve.is_drawn]
        said = [plot.caption, f"Not measured by {', '.join(without)}." * bool(without), self._incomparable(plot.key)]
        of_axis = self._of_loss(curves) if plot is LOSS else {"limits": tuple(plot.limits)}
        drawn = svg(Plot(curves, plot.unit, self.along, until=self.until, legend=False, **of_axis))
        return Figure(plot.title, " ".join(filter(None, said)), drawn, wide)

    def _of_loss(self, curves: list[Curve]) -> dict[str, Any]:
        """The level of a network that has learned nothing, where it is the same for all."""
        levels = {run.baseline for run in self.runs if run.rows}
        name, of_nothing = levels.pop() if len(levels) == 1 else ("", None)
        return {"limits": loss_limits(curves, of_nothing), "level": loss_level(name, of_nothing)}

    def _incomparable(self, key: str) -> str:
        mark = _measurement(key)
        marks = {newest for run in self.runs if (newest := _latest_mark(run.rows, mark))}
        return "These were measured with other images or keys, and do not compare." if len(marks) > 1 else ""


def _measurement(key: str) -> str:
    """The field that is the same where figures of this key compare; "" where all do."""
    group = key.partition("/")[0]
    return f"{group}/measurement" if group in ("knn", "health") else ""


def _latest_mark(rows: Rows, mark: str) -> str | None:
    return next((r[mark] for r in reversed(rows) if mark and r.get(mark)), None)


def _all_curves(runs: Sequence[ComparedRun]) -> list[Figure]:
    draw = Curves(runs, IMAGES)
    figures = [
        draw.figure(LOSS, wide=True, smooth=True),
        draw.figure(SHARE_OF_LOSS, smooth=True) if _baselines_differ(runs) else None,
        *(draw.figure(plot) for plot in (KNN, PROBE, *HEALTH)),
        *(draw.figure(plot, smooth=True) for plot in _of_methods(runs)),
        *(draw.figure(plot, smooth=plot.key != "lr") for plot in OF_TRAINING),
    ]
    return [figure for figure in figures if figure]


def _baselines_differ(runs: Sequence[ComparedRun]) -> bool:
    return len({run.baseline for run in runs if run.rows}) > 1


def _of_methods(runs: Sequence[ComparedRun]) -> list[MetricPlot]:
    """What the runs' methods declare, each once, and then what they log beside that."""
    told = [p for run in runs for p in latest(run.events, "plots") or []]
    told += [p for run in runs for section in latest(run.events, "sections") or [] for p in section["plots"]]
    declared = {p["key"]: MetricPlot(**p) for p in told}
    names = sorted({k for run in runs for row in run.rows for k, v in row.items() if "/" in k and is_number(v)})
    known = {*declared, *(p.key for p in (*HEALTH, *OF_TRAINING))}
    more = [k for k in names if k not in known and k.partition("/")[0] not in OWN_GROUPS]
    return [*declared.values(), *(MetricPlot(key, "As the method logs it.", key, "") for key in more)]


def _over(runs: Sequence[ComparedRun], axis: str) -> list[Figure]:
    """What was reached for what it took."""
    draw = Curves(runs, axis)
    loss = SHARE_OF_LOSS if _baselines_differ(runs) else LOSS
    figures = [draw.figure(loss, smooth=True), draw.figure(KNN), draw.figure(PROBE)]
    return [figure for figure in figures if figure] if draw.until else []


# --- the page


def write_comparison(paths: Sequence[Path], out: Path, flops: Callable[[Config], int]) -> list[ComparedRun]:
    """Write the page to `out`, published by rename; the runs that are in it. flops: see `read_runs`. Raises
    UserError."""
    out = Path(out)
    _check_out(out)
    runs = read_runs(paths, flops)
    write_page(out, "comparison.html.j2", _data(runs))
    return runs


def _check_out(out: Path) -> None:
    """Raises UserError where there is something else than a page."""
    if out.is_dir():
        raise UserError(Problem("--out", out, "that is a folder", out / "compare.html"))
    if not out.parent.is_dir():
        raise UserError(Problem("--out", out, f"there is no folder {out.parent}"))
    if out.exists():
        with out.open("rb") as file:
            if not file.read(64).lstrip().lower().startswith(BEGINS):
                raise UserError(Problem("--out", out, "that file is no page of HTML, and is not replaced"))


def _data(runs: list[ComparedRun]) -> dict[str, Any]:
    swatches = dict(zip((run.name for run in runs), map(swatch, runs, RUN_LINES)))

    def name(run: ComparedRun) -> Markup:
        return swatches[run.name]

    return {
        "title": f"{counted(len(runs), 'run')} compared",
        "names": [run.name for run in runs],
        "swatches": list(swatches.values()),
        "keys": [(key, *map(value_text, values)) for key, values in differing_keys(runs).items()],
        "without_recipe": [run.name for run in runs if not run.keys],
        "standing": standing(runs, name),
        "plots": _all_curves(runs),
        "over_time": _over(runs, RUNNING_S),
        "over_compute": _over(runs, COMPUTE),
        "without_compute": [run.name for run in runs if run.flops is None],
        "results": [
            (name(run), row.task, row.figure, row.score, row.untrained, row.of, row.protocol)
            for run, row in sorted(
                ((run, row) for run in runs for row in rows_of(run.results)), key=lambda of: (of[1].task, of[1].figure)
            )
        ],
        "paths": [(name(run), shown(run.path)) for run in runs],
    }


def swatch(run: ComparedRun, line: tuple[str, str]) -> Markup:
    """The run's line and its name."""
    colour = next(name for name, value in COLOURS.items() if value == line[0])
    style = f"stroke:var(--{colour});stroke-width:3;stroke-dasharray:{DASHES[line[1]]}"
    drawn = f'<svg viewBox="0 0 26 8" aria-hidden=true><path d="M0 4H26" style="{style}"/></svg>'
    return Markup(f"<span class=run>{drawn}{escape(run.name)}</span>")
