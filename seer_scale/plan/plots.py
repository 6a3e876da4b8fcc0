"""A plan as a picture: what a rank holds over an update, by what it is for, and what the update takes, by what it goes
into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seer_scale.formatting import memory_size, paragraph
from seer_scale.plan.memory import SLACK, WORKSPACES, block_of, states
from seer_scale.plan.outputs import new_file
from seer_scale.plan.plan import (
    IDLE,
    NOT_HIDDEN,
    Plan,
    device_word,
    headline,
    speed,
    time_rows,
    verdict,
    where_most_is_held,
)
from seer_scale.plan.time import milliseconds, schedule
from seer_scale.plan.trace import COLLECTIVES, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")
"""Endings of names, each of a kind of picture."""
STACKED = {
    "CUDA context": "#8d929b",
    "communicators": "#a9aeb6",
    WORKSPACES: "#c5c9cf",
    "parameters": "#3367b1",
    "moving averages": "#86a8d8",
    "buffers": "#1c3f73",
    "optimiser state": "#7b57b8",
    "gradients": "#c8702b",
    "update": "#8a5a3a",
    "gathered units": "#1f8f9e",
    "half-precision weights": "#7cc3cc",
    "communication": "#d8b24a",
    "views": "#8a8127",
    "loss": "#bf4043",
    "activations": "#2b8a5e",
    SLACK: "#eceef2",
}
"""Colours of the kinds of memory, from the bottom to the top: what stays lies below what comes and goes."""
COMPUTING, COLLECTIVE = "#3367b1", "#1f8f9e"
POINTS = 800
"""Of the horizontal axis; of what happens between two of them, that is drawn in which most is held."""
SEEN = 1 / 500
"""Of the picture's height: what is less, and nothing at the peak, is not in the legend."""


@dataclass(frozen=True)
class MemoryOverTime:
    """seconds [N]: of an update. kinds: bytes [N] of each, in the order they are stacked. peak: at which of N most is
    held."""

    seconds: np.ndarray
    kinds: dict[str, np.ndarray]
    peak: int


def memory_over_time(plan: Plan) -> MemoryOverTime:
    """What was traced, at the time at which the device comes to it, with what is taken beside tensors.

    At its peak it is what the plan says of each kind, byte for byte: what micro-batches beyond those traced hold then
    is held here throughout. The allocator keeps what it has taken, so all that it holds unused is slack.
    """
    trace, memory = plan.trace, plan.memory
    block, times = block_of(trace, plan.device), op_times(plan)
    traced = memory.traced
    beside = Counter(memory.kinds)
    beside.subtract(traced.kinds)
    beside[WORKSPACES] -= traced.workspace
    names = [kind for kind in STACKED if kind != SLACK]
    width, at_peak = times[-1] / POINTS, -1
    most: list[tuple[int, list[int]]] = [(-1, [])] * POINTS
    last: list[list[int] | None] = [None] * POINTS
    for at, nbytes, kinds, workspace in states(trace, block):
        point = min(POINTS - 1, int(times[min(at, len(times) - 1)] / width))
        held = [kinds[kind] + beside[kind] + workspace * (kind == WORKSPACES) for kind in names]  # type: ignore[index]
        last[point] = held
        if nbytes > most[point][0]:
            most[point] = nbytes, held
        if (at, nbytes) == (traced.op, traced.nbytes):
            most[point], at_peak = (nbytes, held), point
    rows, before = [], most[0][1]
    for (_, held), after in zip(most, last):
        rows.append(held or before)
        before = after or before
    drawn = dict(zip(names, np.array(rows, dtype=np.int64).T))
    if plan.device.asynchronous:
        drawn[SLACK] = np.maximum(0, memory.total - sum(drawn.values()))
    return MemoryOverTime((np.arange(POINTS) + 0.5) * width, {k: v for k, v in drawn.items() if v.any()}, at_peak)


def op_times(plan: Plan) -> list[float]:
    """When the device's first stream comes to each operation of the trace, and when the update ends, in seconds."""
    trace = plan.trace
    found = schedule(trace.steps, plan.device)
    computing = Counter(op.stream for op in trace.ops).most_common(1)[0][0]
    now, times = 0.0, []
    for op, begin in zip(trace.ops, found.begins):
        now = max(now, begin) if op.stream == computing else now
        times.append(now)
    return [*times, max(now, found.seconds)]


def phases(trace: Trace, times: Sequence[float]) -> list[tuple[str, float, float]]:
    """(name, begin, end in seconds) of what an update does, in order."""
    names = ["backward" if op.phase == "recompute" else str(op.phase) for op in trace.ops]
    after = ""
    for i in range(len(names) - 1, -1, -1):  # from the last unit to backward a forward makes the loss
        if names[i] == "forward" and not trace.ops[i].unit and after in ("loss", "backward"):
            names[i] = "loss"
        after = names[i]
    spans, begin = [], 0
    for name, same in groupby(names):
        end = begin + len(list(same))
        spans.append((name, times[begin], times[end]))
        begin = end
    return spans


# ------------------------------------------------------------------------------------------------ what is drawn


def draw(plan: Plan, path: Path, recipe: str) -> None:
    """The picture, of the kind that the path's ending names, whole or not at all. Raises UserError, also where
    something stands there."""
    from matplotlib import rc_context

    from seer_scale.observe.report.plots import STYLE

    ending = path.suffix.lower()
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with new_file(path) as aside, rc_context(STYLE):
        figure_of(plan, recipe).savefig(aside, format=ending[1:], dpi=96, metadata=undated.get(ending))


def figure_of(plan: Plan, recipe: str) -> Figure:
    """Memory above, time below."""
    from matplotlib.figure import Figure

    rows = time_rows(plan)
    figure = Figure(figsize=(12, 6.6 + 0.27 * len(rows)), layout="constrained")
    above, below = figure.subplots(2, height_ratios=[5.2, 0.6 + 0.27 * len(rows)])
    figure.suptitle(paragraph(f"{recipe}: {headline(plan)}", 140), x=0.01, ha="left", fontsize=11)
    _draw_memory(above, plan)
    _draw_time(below, plan, rows)
    return figure


def _draw_memory(ax: Axes, plan: Plan) -> None:
    held, memory, gib = memory_over_time(plan), plan.memory, 2**30
    scale, unit = (1000, "ms") if held.seconds[-1] < 10 else (1, "s")
    top, right = max(memory.capacity, memory.total) / gib, scale * held.seconds[-1]
    x, below = scale * held.seconds, np.zeros(len(held.seconds))
    for kind, nbytes in held.kinds.items():
        is_seen = nbytes[held.peak] or nbytes.max() > SEEN * top * gib
        label = f"{memory_size(nbytes[held.peak]):>9}  {kind}" if is_seen else None
        ax.fill_between(x, below / gib, (below + nbytes) / gib, color=STACKED[kind], linewidth=0, label=label)
        below = below + nbytes
    tensors = (below - held.kinds.get(SLACK, 0))[held.peak] / gib
    ax.set(xlim=(0, right), ylim=(0, 1.12 * top), ylabel="GiB", xlabel=f"{unit} of an update, as simulated")
    ax.axhline(memory.capacity / gib, color="#bf4043", linestyle="--", linewidth=1.2)
    ax.annotate(
        f"{plan.device.name} has {memory_size(memory.capacity)}", (0, memory.capacity / gib), (6, 4),
        textcoords="offset points", color="#bf4043",
    )  # fmt: skip
    at_right = x[held.peak] > 0.5 * right
    ax.plot(x[held.peak], tensors, "v", color="#3b4049", markersize=7)
    ax.annotate(
        f"peak: {where_most_is_held(plan)}", (x[held.peak], tensors), (-8 if at_right else 8, 7),
        textcoords="offset points", ha="right" if at_right else "left", weight="bold",
    )  # fmt: skip
    _mark_phases(ax, plan, scale)
    num, traced = plan.config.num_micro_batches(plan.gpus), plan.trace.config.num_micro_batches(plan.gpus)
    more = f"; drawn: {traced} of {num:,} micro-batches, with what all of them hold" if num > traced else ""
    ax.set_title(f"Memory of a {device_word(plan)}, {verdict(memory)}{more}", loc="left", pad=34, fontsize=11)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9.5,
        title=f"{memory_size(memory.total)} at the peak", alignment="left", title_fontproperties={"weight": "bold"},
    )  # fmt: skip


def _mark_phases(ax: Axes, plan: Plan, scale: float) -> None:
    """A line where each begins, and its name above, slanting where it is short, where there is room."""
    times = op_times(plan)
    until = -1.0
    for name, begin, end in phases(plan.trace, times):
        share, middle = (end - begin) / times[-1], (begin + end) / 2 / times[-1]
        if share < 0.002:
            continue
        ax.axvline(scale * begin, color="#3b4049", linewidth=0.6, alpha=0.5)
        is_wide = share > 0.012 * len(name)
        left = middle - 0.006 * len(name) if is_wide else middle - 0.01
        if left > until:
            ax.annotate(
                name, (middle, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=9,
                ha="center" if is_wide else "left", va="bottom", rotation=0 if is_wide else 35, rotation_mode="anchor",
            )  # fmt: skip
            until = middle + (0.006 * len(name) if is_wide else 0.015)


def _draw_time(ax: Axes, plan: Plan, rows: Sequence[tuple[str, float]]) -> None:
    from matplotlib.patches import Patch

    colours = dict.fromkeys(COLLECTIVES.values(), COLLECTIVE) | {NOT_HIDDEN: "#c8702b", IDLE: "#8d929b"}
    names, seconds = [name for name, _ in rows], [s for _, s in rows]
    bars = ax.barh(names, seconds, color=[colours.get(name, COMPUTING) for name in names], height=0.7)
    ax.bar_label(bars, [milliseconds(s) for s in seconds], padding=4, fontsize=9.5)
    ax.invert_yaxis()
    ax.margins(x=0.1, y=0.02)
    ax.grid(False, axis="y")
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.set_title(f"Time of an update, {speed(plan.time)}", loc="left", fontsize=11)
    if plan.gpus > 1:
        ax.legend(
            [Patch(color=COMPUTING), Patch(color=COLLECTIVE)], ["computing", "collectives, beside it where they can"],
            frameon=False, fontsize=9.5, loc="lower right",
        )  # fmt: skip
