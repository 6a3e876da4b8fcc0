"""The sections of a report and the page around them.

Made from metrics.jsonl, config.yaml and gallery/ of the run directory, whichever of them exist, at any time of a run.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from html import escape
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from seer_scale import __version__
from seer_scale.config import load_recipe
from seer_scale.files import shown, write_whole
from seer_scale.formatting import counted, duration, rate, short_number
from seer_scale.observe.metric_plot import MetricPlot
from seer_scale.observe.records import BEGINNINGS, compare, read_metrics
from seer_scale.observe.report.parts import section, table
from seer_scale.observe.report.pictures import Pictures
from seer_scale.observe.report.plots import BLUE, FAINT, GREEN, INK, ORANGE, Plot, Rows, is_number, metric, svg
from seer_scale.observe.time_account import CATEGORIES, TimeAccount, read_time_account

MAX_EVENTS = 40
PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""


def headline(rows: Rows) -> str | None:
    """`kNN top-1: A % before, B % after`, or what of it is known; None without an evaluation. What was measured before
    the last row, or was not meant to be the last, is said to be `at N samples`."""
    known = [r for r in rows if is_number(r.get("knn/top1"))]
    if not known:
        return None
    before = [f"{_percent(r)} before" for r in known[:1] if r["samples_seen"] == 0]
    after = [f"{_percent(r)} {_when(r, rows)}" for r in known[-1:] if r["samples_seen"] > 0]
    if before and after and not compare(known[0], known[-1]):
        return (
            f"kNN top-1: {after[0]} (what stood before, {_percent(known[0])}, was measured with other images or keys)"
        )
    return "kNN top-1: " + ", ".join(before + after)


def _when(row: dict[str, Any], rows: Rows) -> str:
    seen = row["samples_seen"]
    is_end = row.get("knn/stage", "after") == "after" and seen == rows[-1]["samples_seen"]
    return "after" if is_end else f"at {counted(seen, 'sample')}"


def _percent(row: dict[str, Any]) -> str:
    error = row.get("knn/top1_stderr")
    return f"{row['knn/top1']:.1f} %" + (f" ± {error:.1f}" if is_number(error) else "")


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html, published by rename, and return its path."""
    run_dir = Path(run_dir)
    rows, events = read_metrics(run_dir)
    config_path = run_dir / "config.yaml"
    config = load_recipe(str(config_path)) if config_path.exists() else {}
    pictures, account = Pictures(run_dir), read_time_account(run_dir)
    restarts = max(0, len(account.attempts) - 1)
    body = "\n".join(
        [
            _head(run_dir, rows, events, config, restarts),
            _curves(rows, events),
            _life(account),
            pictures.crops(),
            pictures.neighbours(),
            pictures.prototypes(),
            _reproduce(run_dir, events, config),
            _history(events, restarts),
        ]
    )
    style = resources.files(__package__).joinpath("style.css").read_text()
    page = PAGE.replace("{title}", _name(run_dir)).replace("{style}", style).replace("{body}", body)
    path = run_dir / "report.html"
    write_whole(path, page.encode(errors="backslashreplace"))  # logs of old hold names as they were
    return path


def _name(run_dir: Path) -> str:
    return escape(shown(run_dir.resolve().name))


# ------------------------------------------------------------------------------------------------ the head


def _head(run_dir: Path, rows: Rows, events: Rows, config: dict[str, Any], restarts: int) -> str:
    line, big = headline(rows), "No kNN evaluation yet"
    if line:
        big = re.sub(r"[\d.]+ %( ± [\d.]+)?", lambda m: f"<b>{m[0]}</b>", escape(line))
    elif not _began(events).get("labelled", True):
        big = "Images without labels"
    facts = "\n".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>"
        for k, v in _facts(rows, events, config, restarts).items()
    )
    known = [r for r in rows if is_number(r.get("knn/top1"))]
    better = len(known) > 1 and compare(known[0], known[-1]) and known[-1]["knn/top1"] > known[0]["knn/top1"]
    explained = (
        "The share of held-out images whose class is found by a vote of their nearest neighbours"
        f"{', with its standard error' if any('knn/top1_stderr' in r for r in rows) else ''}. "
    )
    majority = next((r["knn/majority"] for r in reversed(rows) if is_number(r.get("knn/majority"))), None)
    if majority is not None:
        explained += f"Naming the commonest class every time would be right for {majority:.1f} %. "
    written = time.strftime("%Y-%m-%d %H:%M")
    return (
        f"<header><p class=kicker>Self-supervised pretraining · seer_scale · {written}</p><h1>{_name(run_dir)}</h1>"
        f'<p class="headline{" better" * better}">{big}</p>'
        f"<p class=note>{explained * bool(known)}No label was used in training.</p><dl>{facts}</dl></header>"
    )


def _began(events: Rows) -> dict[str, Any]:
    """What the newest start said."""
    return next((e for e in reversed(events) if e["event"] in BEGINNINGS), {})


def _facts(rows: Rows, events: Rows, config: dict[str, Any], restarts: int) -> dict[str, str]:
    """What a person asks first of a run, as far as it is known."""

    def get(key: str) -> Any:
        part, name = key.split(".")
        return (config.get(part) or {}).get(name)

    facts: dict[str, str] = {}
    begun = _began(events)
    steps = [r for r in rows if "step" in r]
    if get("model.name"):
        facts["Backbone"] = get("model.name")
    if is_number(begun.get("parameters")):
        facts["Parameters"] = short_number(begun["parameters"])
    if rows:
        total = begun.get("end", get("train.total_samples"))
        seen = rows[-1]["samples_seen"]
        of = f" of {total:,}" if is_number(total) and total > seen else ""
        epoch = next((r["epoch"] for r in reversed(rows) if is_number(r.get("epoch"))), None)
        facts["Images seen"] = f"{seen:,}{of}" + (f" · epoch {epoch:.3g}" if epoch is not None else "")
    if get("train.global_batch"):
        facts["Batch"] = f"{get('train.global_batch'):,} images · {get('train.precision') or 'fp32'}"
    if get("parallel.engine"):
        ranks = begun.get("ranks")
        facts["Engine"] = begun.get("engine", get("parallel.engine")) + (
            f" · {counted(ranks, 'rank')}" if ranks else ""
        )
    if (seconds := _wall_s(rows, events)) > 0:
        facts["From first to last line"] = duration(seconds)
    speed = [r["throughput/img_per_s"] for r in steps if is_number(r.get("throughput/img_per_s"))]
    if speed:
        facts["Throughput"] = f"{rate(statistics.median(speed))} images/s"
    peak = [r["mem/peak_gib"] for r in steps if is_number(r.get("mem/peak_gib"))]
    if peak:
        facts[_memory(events)] = f"{max(peak):.2f} GiB a rank"
    facts["Restarts"] = str(restarts) if restarts else "none"
    return facts


def _memory(events: Rows) -> str:
    """Whose memory mem/peak_gib is: the allocator's on a GPU, the process's elsewhere."""
    return "Peak GPU memory" if _began(events).get("device") == "cuda" else "Peak host memory"


def _wall_s(rows: Rows, events: Rows) -> float:
    """Seconds the run was running: from the first to the last sign of life of each process."""
    signs = sorted(
        (r["wall_time"], r.get("event") in BEGINNINGS) for r in rows + events if is_number(r.get("wall_time"))
    )
    return sum(b - a for (a, _), (b, begins) in zip(signs, signs[1:]) if not begins)


# ------------------------------------------------------------------------------------------------ the curves


def _latest(events: Rows, fact: str) -> Any:
    """What the newest start that tells of it says."""
    return next((e[fact] for e in reversed(events) if e.get("event") in BEGINNINGS and e.get(fact)), None)


def _curves(rows: Rows, events: Rows) -> str:
    restarts = [e["samples_seen"] for e in events if e["event"] == "resume"]
    until = max((r["samples_seen"] for r in rows), default=0) or 1

    def plot(title: str, caption: str, *curves: Any, wide: bool = False, **how: Any) -> str:
        picture = svg(Plot(list(curves), breaks=restarts, until=until, **how))
        return (
            f'<figure class="plot{" wide" * wide}"><h3>{escape(title)}</h3>'
            + (picture or "<p class=missing>Not measured yet.</p>")
            + f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def of(key: str, name: str, colour: str, **how: Any) -> Any:
        return metric(rows, key, name, colour, **how)

    loss = of("loss", "loss", BLUE, digits=".4f", smooth=True)
    baseline, of_nothing = _latest(events, "baseline") or ("", None)
    finite = [y for y in loss.y if math.isfinite(y)]
    limits: tuple[float | None, float | None] = (None, None)
    if of_nothing and finite:  # a loss that hugs it must look like it, not fill the plot with its noise
        gap = 0.05 * (max(finite) - min(finite))
        limits = (min(min(finite) - gap, 0.93 * of_nothing), max(max(finite) + gap, 1.02 * of_nothing))
    knn = of(
        "knn/top1",
        "kNN top-1",
        GREEN,
        digits=".1f",
        unit="%",
        spread="knn/top1_stderr",
        ends=True,
        apart="knn/measurement",
    )
    apart = (
        " Points that no line joins were measured with other images or keys, and do not compare." if knn.gaps else ""
    )
    majority = next((r["knn/majority"] for r in reversed(rows) if is_number(r.get("knn/majority"))), None)
    heights = [y + s for y, s in zip(knn.y, knn.spread or []) if math.isfinite(y)]
    most = max(heights + [majority or 0.0]) + 10 if heights else None
    wait_s = [
        r | {"wait_s": r["time/step_s"] * r["time/data_wait_frac"]}
        for r in rows
        if is_number(r.get("time/step_s")) and is_number(r.get("time/data_wait_frac"))
    ]
    own = [MetricPlot(**plot) for plot in _latest(events, "plots") or []]
    restarted = " Dotted vertical lines are restarts." if restarts else ""
    return section(
        "How it went",
        (
            f"All curves run over the number of images seen, the one clock of a run.{restarted} Point at a curve "
            "to read its values."
        ),
        "<div class=plots>",
        plot(
            "Loss",
            "Lower is better. The dashed line is the loss of a network that has learned nothing: a curve that stays on "
            "it has learned nothing, one that leaves it has.",
            loss,
            wide=True,
            limits=limits,
            level=(of_nothing, f"{baseline} = {of_nothing:.3f}: nothing learned") if of_nothing else None,
        ),
        plot(
            "kNN top-1",
            "Held-out images classified by the vote of their nearest neighbours, with the standard error. The "
            f"first point is before training; rising means that features group what belongs together.{apart}",
            knn,
            unit="%",
            limits=(0, most),
            level=(majority, "always the commonest class") if majority else None,
        ),
        plot(
            "Learning rate",
            "The schedule as it was applied: warm-up, then decay.",
            of("lr", "learning rate", INK),
            limits=(0, None),
        ),
        *(
            plot(
                p.title,
                p.caption,
                of(
                    p.key,
                    p.name,
                    colour,
                    scale=p.scale,
                    digits=".1f" if p.scale == 100 else ".4f",
                    unit=p.unit,
                    smooth=True,
                ),
                unit=p.unit,
                limits=tuple(p.limits),
            )
            for p, colour in zip(own, cycle((BLUE, ORANGE, GREEN)))
        ),
        plot(
            "Gradient norm",
            ("Of all parameters together, before the update. A jump upwards comes before trouble; 0 teaches nothing."),
            of("grad_norm", "gradient norm", INK, smooth=True),
            limits=(0, None),
        ),
        plot(
            _memory(events),
            "The most a rank has held so far.",
            of("mem/peak_gib", "peak", BLUE, digits=".2f", unit="GiB"),
            unit="GiB a rank",
            limits=(0, None),
        ),
        plot(
            "Time of an update",
            "From one update to the next without evaluations and checkpoints, and what of it the slowest "
            "rank waited for images: where the two meet, the loaders set the pace.",
            of("time/step_s", "update", BLUE, unit="s", smooth=True),
            metric(wait_s, "wait_s", "waiting for images", ORANGE, unit="s", smooth=True),
            unit="s",
            limits=(0, None),
        ),
        plot(
            "Throughput",
            "Images trained on each second, over all ranks.",
            of("throughput/img_per_s", "throughput", ORANGE, unit="images/s", smooth=True),
            unit="images/s",
            limits=(0, None),
        ),
        "</div>",
    )


def _life(account: TimeAccount) -> str:
    """How far the run was at each hour, and what its time went into."""
    if not account.attempts or account.total_s <= 0:
        return ""
    first = account.attempts[0].began
    hour = 3600 if account.total_s > 7200 else 60

    def climb(ax: Axes) -> None:
        for life, following in zip(account.attempts, [*account.attempts[1:], None]):
            x = [(t - first) / hour for t in (life.began, life.ready, life.ended)]
            ax.plot(x, [life.seen[0], *life.seen], color=BLUE, solid_capstyle="butt")
            if following:
                ax.axvspan(x[-1], max(x[-1], (following.began - first) / hour), color=FAINT, linewidth=0)
            if following and following.seen[0] < life.seen[1]:
                back = [max(x[-1], (following.began - first) / hour)] * 2
                ax.plot([x[-1], *back], [life.seen[1], life.seen[1], following.seen[0]], color=ORANGE, linestyle=":")
        ax.yaxis.set_major_formatter(short_number)

    picture = svg(Plot([], "images seen", "hours" if hour == 3600 else "minutes", (0, None), draw=climb))
    spent = [
        (words, duration(account.seconds[cause]), f"{100 * account.seconds[cause] / account.total_s:.1f} %")
        for cause, words in CATEGORIES.items() if account.seconds[cause] > 0
    ]  # fmt: skip
    lives = [
        (time.strftime("%F %T", time.localtime(life.began)), life.on, f"{life.seen[0]:,} to {life.seen[1]:,}",
         duration(life.ended - life.began), duration(life.lost_s), life.cause)
        for life in account.attempts
    ]  # fmt: skip
    mean = account.mean_time_to_recover_s
    recovered = (
        f" After an end that was not the run's, the next update came after {duration(mean)} in the mean."
        if mean is not None
        else ""
    )
    return section(
        "The life of the run",
        f"Shares are of all time from its first start.{recovered}",
        f'<figure class="plot wide">{picture}<figcaption>Images seen over the clock. Grey is the time between '
        "two starts; dotted is work "
        "that a restart had to do again.</figcaption></figure>",
        table(("what", "time", "share of all time"), spent),
        table(("began", "on", "images seen", "lasted", "lost", "ended by"), lives),
    )


# ------------------------------------------------------------------------------------------------ how to make it again


def _reproduce(run_dir: Path, events: Rows, config: dict[str, Any]) -> str:
    """The command, the versions and the machine of the newest start, and the whole recipe."""
    begun = _began(events)
    seed = (config.get("run") or {}).get("seed")
    facts = {"seer_scale": __version__} | {str(k): str(v) for k, v in (begun.get("versions") or {}).items()}
    if begun.get("command"):
        facts = {"started by": str(begun["command"])} | facts
    if seed is not None:
        facts["seed"] = str(seed)
    place = run_dir / "config.yaml"
    recipe = (
        f"<details><summary>The whole recipe (config.yaml)</summary><pre>{escape(place.read_text())}</pre></details>"
        if place.exists()
        else ""
    )
    return section(
        "How to reproduce it",
        "The recipe below is complete: every key with the value it had. Its images and their order, crops and "
        "initial weights follow from it and the seed, whatever the number of ranks.",
        f"<pre class=command>seer-scale train {escape(shown(run_dir.name))}/config.yaml --run.dir NEW</pre>",
        table(("what", "value"), facts.items()),
        recipe,
    )


# ------------------------------------------------------------------------------------------------ the history


def _history(events: Rows, restarts: int) -> str:
    resumes = [e for e in events if e["event"] == "resume"]
    rest = [e for e in events if e["event"] != "resume"]
    kept = [e for e in events if e in resumes or e in rest[:1] + rest[-MAX_EVENTS:]]
    counted = {0: "It was never restarted.", 1: "It was restarted once."}.get(
        restarts, f"It was restarted {restarts} times."
    )
    rows = [(_clock(e), f"{e['samples_seen']:,}", str(e["event"]), str(e.get("text", ""))) for e in kept]
    return section(
        "Restarts and other events",
        f"{counted} Nothing is lost by a restart but the stretch since the last checkpoint.",
        table(("time", "images seen", "what", "in words"), rows, [str(e["event"]) for e in kept]) if kept else "",
    )


def _clock(event: dict[str, Any]) -> str:
    at = event.get("wall_time")
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if is_number(at) else ""
