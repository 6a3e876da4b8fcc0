"""The figures of a report: curves over the images seen, and images seen over the clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from seer_scale.formatting import short_number
from seer_scale.observe.metric_plot import MetricPlot
from seer_scale.observe.records import START_EVENTS
from seer_scale.observe.report.plots import BLUE, FAINT, GREEN, INK, ORANGE, Curve, Plot, Rows, is_number, metric, svg
from seer_scale.observe.time_account import TimeAccount


def latest(events: Rows, fact: str) -> Any:
    """What the newest start that tells of it says."""
    return next((e[fact] for e in reversed(events) if e.get("event") in START_EVENTS and e.get(fact)), None)


@dataclass(frozen=True)
class Figure:
    title: str
    caption: str
    svg: Markup
    wide: bool = False


class Figures:
    """Draws metrics over the images seen; breaks: restarts."""

    def __init__(self, rows: Rows, events: Rows):
        self.rows, self.events = rows, events
        self.breaks = [e["samples_seen"] for e in events if e["event"] == "resume"]
        self._until = max((r["samples_seen"] for r in rows), default=0) or 1

    def figure(self, title: str, caption: str, *curves: Curve, wide: bool = False, **how: Any) -> Figure:
        plot = Plot(list(curves), breaks=self.breaks, until=self._until, **how)
        return Figure(title, caption, svg(plot), wide)

    def curve(self, key: str, name: str, colour: str, **how: Any) -> Curve:
        return metric(self.rows, key, name, colour, **how)

    def of_method(self, plots: Iterable[dict[str, Any]]) -> list[Figure]:
        """MetricPlots, as the log keeps them."""
        figures = []
        for plot, colour in zip((MetricPlot(**p) for p in plots), cycle((BLUE, ORANGE, GREEN))):
            digits = ".1f" if plot.scale == 100 else ".4f"
            curve = self.curve(
                plot.key, plot.name, colour, scale=plot.scale, digits=digits, unit=plot.unit, smooth=True
            )
            figures.append(self.figure(plot.title, plot.caption, curve, unit=plot.unit, limits=tuple(plot.limits)))
        return figures


def plots_of_run(draw: Figures) -> list[Figure]:
    figure, curve = draw.figure, draw.curve
    wait_s = [
        r | {"wait_s": r["time/step_s"] * r["time/data_wait_frac"]}
        for r in draw.rows
        if is_number(r.get("time/step_s")) and is_number(r.get("time/data_wait_frac"))
    ]
    return [
        _loss(draw),
        _knn(draw),
        *_probe(draw),
        *_health(draw),
        figure(
            "Learning rate",
            "The schedule as it was applied: warm-up, then decay.",
            curve("lr", "learning rate", INK),
            limits=(0, None),
        ),
        *draw.of_method(latest(draw.events, "plots") or []),
        figure(
            "Gradient norm",
            "Of all parameters together, before the update. A jump upwards comes before trouble; 0 teaches nothing.",
            curve("grad_norm", "gradient norm", INK, smooth=True),
            limits=(0, None),
        ),
        figure(
            memory_title(draw.events),
            "The most a rank has held so far.",
            curve("mem/peak_gib", "peak", BLUE, digits=".2f", unit="GiB"),
            unit="GiB a rank",
            limits=(0, None),
        ),
        figure(
            "Time of an update",
            "From one update to the next without evaluations and checkpoints, and what of it the slowest "
            "rank waited for images: where the two meet, the loaders set the pace.",
            curve("time/step_s", "update", BLUE, unit="s", smooth=True),
            metric(wait_s, "wait_s", "waiting for images", ORANGE, unit="s", smooth=True),
            unit="s",
            limits=(0, None),
        ),
        figure(
            "Throughput",
            "Images trained on each second, over all ranks.",
            curve("throughput/img_per_s", "throughput", ORANGE, unit="images/s", smooth=True),
            unit="images/s",
            limits=(0, None),
        ),
    ]


def _loss(draw: Figures) -> Figure:
    loss = draw.curve("loss", "loss", BLUE, digits=".4f", smooth=True)
    baseline, of_nothing = latest(draw.events, "baseline") or ("", None)
    return draw.figure(
        "Loss",
        "Lower is better. The dashed line is the loss of a network that has learned nothing: a curve that stays on "
        "it has learned nothing.",
        loss,
        wide=True,
        limits=loss_limits([loss], of_nothing),
        level=loss_level(baseline, of_nothing),
    )


def loss_limits(curves: Sequence[Curve], of_nothing: float | None) -> tuple[float | None, float | None]:
    """Of the axis: a loss that hugs that of a network which learned nothing must look like it, not fill the plot with
    its noise."""
    finite = [y for curve in curves for y in curve.y if math.isfinite(y)]
    if not of_nothing or not finite:
        return None, None
    gap = 0.05 * (max(finite) - min(finite))
    return min(min(finite) - gap, 0.93 * of_nothing), max(max(finite) + gap, 1.02 * of_nothing)


def loss_level(baseline: str, of_nothing: float | None) -> tuple[float, str] | None:
    return (of_nothing, f"{baseline} = {of_nothing:.3f}: nothing learned") if of_nothing else None


def _knn(draw: Figures) -> Figure:
    knn = draw.curve(
        "knn/top1",
        "kNN top-1",
        GREEN,
        digits=".1f",
        unit="%",
        spread="knn/top1_stderr",
        ends=True,
        apart="knn/measurement",
    )
    apart = " Points that no line joins were measured with other images or keys, and do not compare."
    commonest = majority(draw.rows)
    heights = [y + s for y, s in zip(knn.y, knn.spread or []) if math.isfinite(y)]
    return draw.figure(
        "kNN top-1",
        "Held-out images classified by the vote of their nearest neighbours, with the standard error. The first point "
        f"is before training; rising means that features group what belongs together.{apart * bool(knn.gaps)}",
        knn,
        unit="%",
        limits=(0, max([*heights, commonest or 0.0]) + 10 if heights else None),
        level=(commonest, "always the commonest class") if commonest else None,
    )


def _probe(draw: Figures) -> list[Figure]:
    if not any("probe/loss" in row for row in draw.rows):
        return []
    top1 = draw.curve("probe/top1", "held-out images", GREEN, digits=".1f", unit="%", spread="probe/top1_stderr")
    on_train = draw.curve("probe/train_top1", "training images", BLUE, digits=".1f", unit="%", smooth=True)
    return [
        draw.figure(
            "Linear probe",
            "Top-1 of a linear classifier that learns beside the network and never touches it. It follows features as "
            "they change, and so lags behind one trained on the finished network.",
            top1,
            on_train,
            unit="%",
            limits=(0, None),
        ),
        draw.figure(
            "Loss of the linear probe",
            "Cross-entropy on crops of the training images, before the probe learns from them.",
            draw.curve("probe/loss", "loss", INK, smooth=True),
            limits=(0, None),
        ),
    ]


def _health(draw: Figures) -> list[Figure]:
    """Of features, as docs/health.md explains them; none where they were not measured."""
    if not any("health/rankme" in row for row in draw.rows):
        return []

    def curve(key: str, name: str, colour: str, **how: Any) -> Curve:
        return draw.curve(f"health/{key}", name, colour, apart="health/measurement", **how)

    return [
        draw.figure(
            "Effective rank",
            "RankMe: how many directions features and embeddings of different images really use. A fall to a few is "
            "collapse; a slow fall late in a run means that fewer things are told apart.",
            curve("rankme", "features", BLUE, digits=".1f", ends=True),
            curve("rankme_embeddings", "embeddings", ORANGE, digits=".1f"),
            limits=(0, None),
        ),
        draw.figure(
            "Alignment and uniformity",
            "Of embeddings. Alignment: squared distance of two views of an image, 0 at best. Uniformity: how evenly "
            "images are spread, 0 where all are one and about -4 at best. Both near 0 is collapse.",
            curve("alignment", "alignment", GREEN, digits=".2f"),
            curve("uniformity", "uniformity", ORANGE, digits=".2f"),
        ),
        draw.figure(
            "Norm of features",
            "Mean over images, with its deviation. A norm that grows without end comes before overflow in half "
            "precision; a deviation of 0 means that all images look alike.",
            curve("feature_norm", "norm", INK, spread="health/feature_norm_std"),
            limits=(0, None),
        ),
    ]


def climb(account: TimeAccount) -> Markup:
    """Images seen over the clock."""
    attempts, hour = account.attempts, 3600 if account.total_s > 7200 else 60

    def at(unix_s: float) -> float:
        return (unix_s - attempts[0].began) / hour

    def draw(ax: Axes) -> None:
        for attempt in attempts:
            x = [at(attempt.began), at(attempt.ready), at(attempt.ended)]
            ax.plot(x, [attempt.seen[0], *attempt.seen], color=BLUE, solid_capstyle="butt")
        for attempt, following in zip(attempts, attempts[1:]):
            end, again = at(attempt.ended), max(at(attempt.ended), at(following.began))
            ax.axvspan(end, again, color=FAINT, linewidth=0)
            if following.seen[0] < attempt.seen[1]:
                back = [attempt.seen[1], attempt.seen[1], following.seen[0]]
                ax.plot([end, again, again], back, color=ORANGE, linestyle=":")
        ax.yaxis.set_major_formatter(short_number)

    return svg(Plot([], "images seen", "hours" if hour == 3600 else "minutes", (0, None), draw=draw))


def newest_start(events: Rows) -> dict[str, Any]:
    """What the newest start said."""
    return next((e for e in reversed(events) if e["event"] in START_EVENTS), {})


def majority(rows: Rows) -> float | None:
    """Percent that naming the commonest class every time would get right."""
    return next((r["knn/majority"] for r in reversed(rows) if is_number(r.get("knn/majority"))), None)


def memory_title(events: Rows) -> str:
    """Whose memory mem/peak_gib is: the allocator's on a GPU, the process's elsewhere."""
    return "Peak GPU memory" if newest_start(events).get("device") == "cuda" else "Peak host memory"
