"""report.html: one self-contained page on which a person sees what a run learned.

Made from metrics.jsonl, config.yaml and gallery/ of the run directory, whichever of them exist, at any time of a run.
"""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from seer_scale.config import load_recipe
from seer_scale.files import write_whole
from seer_scale.observe.gallery import read_gallery
from seer_scale.observe.ledger import CAUSES, Ledger, duration, read_ledger
from seer_scale.observe.sinks import BEGINNINGS, read_metrics, speed_text

Rows = list[dict[str, Any]]

BLUE, ORANGE, GREEN, INK, FAINT = "#3367b0", "#c8702a", "#2b8a5f", "#3b4048", "#d9dce1"
MAX_POINTS = 1200  # of a curve; more would only make the page heavier
MAX_EVENTS = 40

STYLE = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef0f3",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # the reader's system font, by the style sheet
    "svg.hashsalt": "seer",
}


def headline(rows: Rows) -> str | None:
    """`kNN top-1: A % before, B % after`, or what of it is known; None without an evaluation."""
    known = [(r["samples_seen"], r["knn/top1"]) for r in rows if _is_number(r.get("knn/top1"))]
    if not known:
        return None
    before = [f"{top1:.1f} % before" for samples, top1 in known[:1] if samples == 0]
    after = [f"{top1:.1f} % after" for samples, top1 in known[-1:] if samples > 0]
    return "kNN top-1: " + ", ".join(before + after)


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html, published by rename, and return its path."""
    run_dir = Path(run_dir)
    rows, events = read_metrics(run_dir)
    config_path = run_dir / "config.yaml"
    config = load_recipe(str(config_path)) if config_path.exists() else {}
    pictures, ledger = _Pictures(run_dir), read_ledger(run_dir)
    restarts = max(0, len(ledger.lives) - 1)
    body = "\n".join(
        [
            _head(run_dir, rows, events, config, restarts),
            _curves(rows, events, config),
            _life(ledger),
            pictures.crops(),
            pictures.neighbours(),
            pictures.prototypes(),
            _history(events, restarts),
        ]
    )
    title = escape(run_dir.resolve().name)
    page = PAGE.replace("{title}", title).replace("{style}", CSS).replace("{body}", body)
    path = run_dir / "report.html"
    write_whole(path, page)
    return path


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _section(title: str, text: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n<p class=lead>{text}</p>\n" + "\n".join(content) + "\n</section>"


# ------------------------------------------------------------------------------------------------ the head


def _head(run_dir: Path, rows: Rows, events: Rows, config: dict[str, Any], restarts: int) -> str:
    line = headline(rows)
    big = re.sub(r"[\d.]+ %", lambda m: f"<b>{m[0]}</b>", escape(line)) if line else "No kNN evaluation yet" if _began(events).get("labelled", True) else "Images without labels"
    facts = "\n".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _facts(rows, events, config, restarts).items()
    )
    known = [r["knn/top1"] for r in rows if _is_number(r.get("knn/top1"))]
    better = len(known) > 1 and known[-1] > known[0]
    name, written = escape(run_dir.resolve().name), time.strftime("%Y-%m-%d %H:%M")
    return (
        f"<header><p class=kicker>Self-supervised pretraining · seer_scale · {written}</p><h1>{name}</h1>"
        f'<p class="headline{" better" * better}">{big}</p>'
        + ("<p class=note>The share of held-out images whose class is found by a vote of their nearest neighbours. " * bool(known) or "<p class=note>")
        + f"No label was used in training.</p><dl>{facts}</dl></header>"
    )


def _began(events: Rows) -> dict[str, Any]:
    """What the newest start said."""
    return next((e for e in reversed(events) if e["event"] in BEGINNINGS), {})


def _facts(rows: Rows, events: Rows, config: dict[str, Any], restarts: int) -> dict[str, str]:
    """What a person asks first of a run, as far as it is known."""

    def get(key: str) -> Any:
        section, name = key.split(".")
        return (config.get(section) or {}).get(name)

    facts: dict[str, str] = {}
    begun = _began(events)
    steps = [r for r in rows if "step" in r]
    if get("model.name"):
        facts["Backbone"] = get("model.name")
    if _is_number(begun.get("parameters")):
        facts["Parameters"] = _short(begun["parameters"])
    if rows:
        total = get("train.samples")
        seen = rows[-1]["samples_seen"]
        of = f" of {total:,}" if _is_number(total) and total > seen else ""
        epoch = next((r["epoch"] for r in reversed(rows) if _is_number(r.get("epoch"))), None)
        facts["Images seen"] = f"{seen:,}{of}" + (f" · epoch {epoch:.3g}" if epoch is not None else "")
    if get("train.global_batch"):
        facts["Batch"] = f"{get('train.global_batch'):,} images · {get('train.precision') or 'fp32'}"
    if get("parallel.engine"):
        ranks = begun.get("ranks")
        facts["Engine"] = begun.get("engine", get("parallel.engine")) + (f" · {ranks} rank{'s' * (ranks != 1)}" if ranks else "")
    if (seconds := _wall_s(rows, events)) > 0:
        facts["Time running"] = str(timedelta(seconds=round(seconds)))
    speed = [r["throughput/img_per_s"] for r in steps if _is_number(r.get("throughput/img_per_s"))]
    if speed:
        facts["Throughput"] = f"{speed_text(statistics.median(speed))} images/s"
    peak = [r["mem/peak_gib"] for r in steps if _is_number(r.get("mem/peak_gib"))]
    if peak:
        facts["Peak memory"] = f"{max(peak):.2f} GiB a rank"
    facts["Restarts"] = str(restarts) if restarts else "none"
    return facts


def _short(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _wall_s(rows: Rows, events: Rows) -> float:
    """Seconds the run was running: from the first to the last sign of life of each process."""
    signs = sorted(
        (r["wall_time"], r.get("event") in BEGINNINGS) for r in rows + events if _is_number(r.get("wall_time"))
    )
    return sum(b - a for (a, _), (b, begins) in zip(signs, signs[1:]) if not begins)


# ------------------------------------------------------------------------------------------------ the curves


def _ln_k(config: dict[str, Any]) -> float | None:
    """Loss of a uniform assignment in nats, the mean over the sets of prototypes."""
    sets = (config.get("swav") or {}).get("prototypes") or []
    sets = sets if isinstance(sets, list) else [sets]
    return statistics.fmean(math.log(k) for k in sets) if sets else None


def _points(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """(samples seen, values) of a metric; values that were not finite leave a gap."""
    some = [(r["samples_seen"], math.nan if r[name] is None else r[name]) for r in rows if name in r]
    some = [(x, y) for x, y in some if _is_number(y)]
    stride = -(-len(some) // MAX_POINTS) or 1
    kept = some[::stride] + (some[-1:] if (len(some) - 1) % stride else [])
    return [x for x, _ in kept], [y for _, y in kept]


def _smooth(values: list[float], share: float = 0.02) -> list[float]:
    """Mean over a centred window of `share` of the curve; not-finite values are left out of it."""
    half, means = max(1, round(len(values) * share / 2)), []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(statistics.fmean(window) if window else math.nan)
    return means


def _curve(ax: Axes, rows: Rows, name: str, colour: str, *, scale: float = 1, smooth: bool = False) -> bool:
    x, y = _points(rows, name)
    y = [scale * v for v in y]
    if smooth and len(y) > 20:
        ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.9)
        y = _smooth(y)
    ax.plot(x, y, color=colour, marker="o" if len(y) < 20 else None, markersize=4.5)
    return any(map(math.isfinite, y))


def _note(ax: Axes, y: float, text: str) -> None:
    ax.axhline(y, color=INK, linestyle=(0, (5, 4)), linewidth=1)
    ax.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(-2, 4), textcoords="offset points", ha="right"
    )


def _curves(rows: Rows, events: Rows, config: dict[str, Any]) -> str:
    ln_k = _ln_k(config)

    def loss(ax: Axes) -> bool:
        drawn = _curve(ax, rows, "loss", BLUE, smooth=True)
        if ln_k and drawn:
            _note(ax, ln_k, f"ln K = {ln_k:.3f}: nothing learned")
            low, high = ax.get_ylim()
            # a loss that hugs ln K must look like it, not fill the plot with its noise
            ax.set_ylim(min(low, 0.93 * ln_k), max(high, 1.02 * ln_k))
        return drawn

    def knn(ax: Axes) -> bool:
        drawn = _curve(ax, rows, "knn/top1", GREEN)
        x, y = _points(rows, "knn/top1")
        for i, offset in {0: (2, -18), len(y) - 1: (0, 8)}.items() if drawn else ():
            ax.annotate(
                f"{y[i]:.1f} %", (x[i], y[i]), xytext=offset, textcoords="offset points", ha="center", weight="bold"
            )
        ax.margins(x=0.08, y=0.2)
        ax.set_ylim(bottom=0)
        return drawn

    def use(ax: Axes) -> bool:
        drawn = _curve(ax, rows, "swav/prototype_use", BLUE, scale=100, smooth=True)
        ax.set_ylim(0, 105)
        return drawn

    def entropy(ax: Axes) -> bool:
        drawn = _curve(ax, rows, "swav/assignment_entropy", ORANGE, scale=100, smooth=True)
        ax.set_ylim(0, 105)
        return drawn

    def rate(ax: Axes) -> bool:
        drawn = _curve(ax, rows, "lr", INK)
        ax.set_ylim(bottom=0)
        return drawn

    def speed(ax: Axes) -> bool:
        drawn = _curve(ax, rows, "throughput/img_per_s", ORANGE, smooth=True)
        ax.set_ylim(bottom=0)
        return drawn

    restarts = [e["samples_seen"] for e in events if e["event"] == "resume"]
    restarted = " Dotted vertical lines are restarts." if restarts else ""

    def plot(title: str, unit: str, draw: Callable[[Axes], bool], caption: str, wide: bool = False) -> str:
        picture = _svg(draw, "images seen", unit, restarts, wide)
        return (
            f'<figure class="plot{" wide" * wide}"><h3>{escape(title)}</h3>'
            + (picture or "<p class=missing>Not measured yet.</p>")
            + f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    return _section(
        "How it went",
        "All curves run over the number of images seen, the one clock of a run." + restarted,
        "<div class=plots>",
        plot("Loss", "nats", loss, "Lower is better. The dashed line is the loss of a network that spreads every image "
             "evenly over all prototypes: a curve that stays on it has learned nothing, one that leaves it has.", True),
        plot("kNN top-1", "%", knn, "Held-out images classified by the vote of their nearest neighbours. "
             "The first point is before training; rising means that features group what belongs together."),
        plot("Learning rate", "", rate, "The schedule as it was applied: warm-up, then decay."),
        plot("Prototypes in use", "%", use, "Share of the prototypes the predictions are spread over. "
             "High is healthy; a fall towards 0 is collapse: every image goes to the same few."),
        plot("Entropy of the assignments", "% of ln K", entropy, "How undecided the target of an image is. At 100 % it "
             "prefers no prototype to another and teaches nothing; near 0 it is sure of one."),
        plot("Throughput", "images/s", speed, "Images trained on each second, over all ranks. Dips are evaluations, "
             "checkpoints or a busy machine.", True),
        "</div>",
    )  # fmt: skip


def _life(ledger: Ledger) -> str:
    """How far the run was at each hour, and what its time went into."""
    if not ledger.lives or ledger.total_s <= 0:
        return ""
    first = ledger.lives[0].began
    hour = 3600 if ledger.total_s > 7200 else 60

    def climb(ax: Axes) -> bool:
        for life, following in zip(ledger.lives, [*ledger.lives[1:], None]):
            x = [(t - first) / hour for t in (life.began, life.ready, life.ended)]
            ax.plot(x, [life.seen[0], *life.seen], color=BLUE, solid_capstyle="butt")
            if following:
                ax.axvspan(x[-1], max(x[-1], (following.began - first) / hour), color=FAINT, linewidth=0)
            if following and following.seen[0] < life.seen[1]:
                back = [max(x[-1], (following.began - first) / hour)] * 2
                ax.plot([x[-1], *back], [life.seen[1], life.seen[1], following.seen[0]], color=ORANGE, linestyle=":")
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
        return True

    picture = _svg(climb, "hours" if hour == 3600 else "minutes", "images seen", [], True)
    rows = "".join(
        f"<tr><td>{escape(words)}</td><td>{duration(ledger.seconds[cause])}</td><td>{100 * ledger.seconds[cause] / ledger.total_s:.1f} %</td></tr>"
        for cause, words in CAUSES.items() if ledger.seconds[cause] > 0
    )  # fmt: skip
    lives = "".join(
        f"<tr><td>{time.strftime('%F %T', time.localtime(life.began))}</td><td>{escape(life.on)}</td><td>{life.seen[0]:,} to {life.seen[1]:,}</td>"
        f"<td>{duration(life.ended - life.began)}</td><td>{duration(life.lost_s)}</td><td>{escape(life.cause)}</td></tr>"
        for life in ledger.lives
    )  # fmt: skip
    mean = ledger.mean_time_to_recover_s
    recovered = f" After an end that was not the run's, the next update came after {duration(mean)} in the mean." if mean is not None else ""
    return _section(
        "The life of the run",
        f"Of the time in which it held its machines, {100 * ledger.goodput:.1f} % went into updates that count.{recovered}",
        f'<figure class="plot wide">{picture}<figcaption>Images seen over the clock. Grey is the time between two starts; dotted is work '
        "that a restart had to do again.</figcaption></figure>",
        f"<table><tr><th>what</th><th>time</th><th>share of all time</th></tr>{rows}</table>",
        f"<table><tr><th>began</th><th>on</th><th>images seen</th><th>lasted</th><th>lost</th><th>ended by</th></tr>{lives}</table>",
    )


def _svg(draw: Callable[[Axes], bool], along: str, unit: str, restarts: list[int], wide: bool) -> str:
    """An inline SVG, or "" when there was nothing to draw."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.5) if wide else (5.1, 3.1), layout="constrained")
        ax = figure.subplots()
        ax.margins(x=0.02)
        if not draw(ax):
            return ""
        for samples in restarts:
            ax.axvline(samples, color="#9aa1ab", linestyle=":", linewidth=1.1, zorder=0)
        ax.set_xlabel(along)
        ax.set_ylabel(unit)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_major_locator(MaxNLocator(6 if wide else 5))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.tick_params(length=0)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' width="[\d.]+pt" height="[\d.]+pt"| xmlns(:\w+)?="[^"]*"', "", svg, count=4)


# ------------------------------------------------------------------------------------------------ the pictures


class _Pictures:
    """The sections made of the gallery; each says what is missing when it is."""

    def __init__(self, run_dir: Path):
        self.folder, self.sections = run_dir / "gallery", read_gallery(run_dir)

    def _image(self, name: str, side: int, label: str = "") -> str:
        path = self.folder / name
        if not path.exists():
            return f'<span class=gone style="width:{side}px;height:{side}px"></span>'
        tiny = " class=tiny" if path.suffix == ".png" else ""
        kind = "png" if path.suffix == ".png" else "jpeg"
        data = base64.b64encode(path.read_bytes()).decode()
        box = f'style="width:{side}px;height:{side}px" alt="{escape(label)}"'
        return f'<img{tiny} {box} src="data:image/{kind};base64,{data}">'

    def _pixels(self, name: str) -> int:
        path = self.folder / name
        return math.prod(Image.open(path).size) if path.exists() else 0

    def crops(self) -> str:
        title = "What the network sees"
        entries = self.sections.get("crops")
        if not entries:
            return _section(title, "This run kept no crops, so there is nothing to show here.")
        lines = []
        for entry in entries:
            largest = max(map(self._pixels, entry["images"]), default=0)
            shown = "".join(self._image(n, 136 if self._pixels(n) == largest else 84) for n in entry["images"])
            lines.append(f"<figure class=strip>{shown}<figcaption>image {entry['index']}</figcaption></figure>")
        text = (
            "Each row holds the crops cut from one image at the first step: large ones, then small ones. The network "
            "is asked to put the crops of a row in the same place, whatever their colours, scale and sharpness."
        )
        return _section(title, text, "<div class=strips>", *lines, "</div>")

    def neighbours(self) -> str:
        title = "Nearest neighbours"
        before, after = ({e["query"]: e for e in self.sections.get(stage, [])} for stage in ("before", "after"))
        if not before and not after:
            return _section(title, "This run kept no neighbours, so there is nothing to show here.")
        blocks = []
        for query in dict.fromkeys([*after, *before]):
            label = (after.get(query) or before[query])["label"]
            rows = [
                f"<div class=stage><span>{stage}</span>{self._row(entries[query])}</div>"
                for stage, entries in (("before", before), ("after", after))
                if query in entries
            ]
            caption = f"<figcaption>{escape(label)}</figcaption>" if label else ""
            blocks.append(
                f"<div class=query><figure>{self._image(query, 124)}{caption}</figure><div>{''.join(rows)}</div></div>"
            )
        text = (
            "Left, an image; right, the images most similar to it, nearest first, before training "
            "and after. The number is the cosine similarity."
        )
        counts = [c for c in (_hits("before", before), _hits("after", after)) if c]
        if counts:
            text += (
                " <span class=right>Green ✓</span> has the class of the query, <span class=wrong>red ✗</span> another."
                f" Of the neighbours shown, {' and '.join(counts)}."
            )
        return _section(title, text, *blocks)

    def _row(self, entry: dict[str, Any]) -> str:
        cells = []
        for near in entry["neighbours"]:
            label, known = near["label"], near["label"] is not None and entry["label"] is not None
            verdict = ("right" if label == entry["label"] else "wrong") if known else "unknown"
            mark = {"right": "✓ ", "wrong": "✗ ", "unknown": ""}[verdict]
            cells.append(
                f"<figure class={verdict}>{self._image(near['image'], 86, label or '')}"
                f"<figcaption><span>{mark}{escape(label or '')}</span>"
                f"<small>{near['similarity']:.2f}</small></figcaption></figure>"
            )
        return "".join(cells)

    def prototypes(self) -> str:
        title = "What prototypes collect"
        entries = self.sections.get("prototypes")
        if not entries:
            return _section(title, "This run kept no images of its prototypes, so there is nothing to show here.")
        lines = [
            f"<figure class=strip>{''.join(self._image(name, 80) for name in e['images'])}"
            f"<figcaption>prototype {e['k']}<small>{100 * e['share']:.2g} % of images</small></figcaption></figure>"
            for e in entries
        ]
        text = (
            "Prototypes are the groups the network made up by itself. Each row shows the images nearest to one of "
            "them, nearest first: a row that makes sense to you is something the network found without being told."
        )
        return _section(title, text, "<div class=strips>", *lines, "</div>")


def _hits(stage: str, entries: dict[str, dict[str, Any]]) -> str:
    """`31 of 48 match after`, or "" where nothing is labelled."""
    pairs = [(n["label"], e["label"]) for e in entries.values() for n in e["neighbours"] if n["label"] and e["label"]]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)} match {stage}" if pairs else ""


# ------------------------------------------------------------------------------------------------ the history


def _history(events: Rows, restarts: int) -> str:
    resumes = [e for e in events if e["event"] == "resume"]
    rest = [e for e in events if e["event"] != "resume"]
    shown = [e for e in events if e in resumes or e in rest[:1] + rest[-MAX_EVENTS:]]
    counted = {0: "It was never restarted.", 1: "It was restarted once."}.get(restarts, f"It was restarted {restarts} times.")
    lines = "".join(
        f'<tr class="{escape(e["event"])}"><td>{_clock(e)}</td>'
        f"<td>{e['samples_seen']:,}</td>"
        f"<td>{escape(e['event'])}</td><td>{escape(str(e.get('text', '')))}</td></tr>"
        for e in shown
    )
    table = f"<table><tr><th>time</th><th>images seen</th><th>what</th><th></th></tr>{lines}</table>" if shown else ""
    return _section(
        "Restarts and other events",
        f"{counted} Nothing is lost by a restart but the stretch since the last checkpoint.",
        table,
    )


def _clock(event: dict[str, Any]) -> str:
    at = event.get("wall_time")
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if _is_number(at) else ""


PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""

CSS = """
:root { color-scheme: light; --ink: #22262c; --soft: #5d6570; --line: #e4e7eb; --right: #2b8a5f; --wrong: #c2453f; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 40px 24px 80px; }
header, section { background: #fff; border: 1px solid var(--line); border-radius: 14px;
                  padding: 32px 36px; margin-bottom: 24px; }
h1 { font-size: 22px; font-weight: 600; margin: 0 0 18px; }
h2 { font-size: 22px; font-weight: 600; margin: 0 0 6px; }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 8px; }
figure { margin: 0; }
figcaption, .note, .lead { color: var(--soft); }
figcaption { font-size: 13px; line-height: 1.45; }
.lead { margin: 0 0 24px; max-width: 88ch; }
.kicker { margin: 0; font-size: 13px; color: var(--soft); letter-spacing: .02em; }
.headline { font-size: 34px; line-height: 1.2; font-weight: 400; letter-spacing: -.01em; margin: 0; }
.headline b { font-weight: 650; white-space: nowrap; } .better b:last-of-type { color: var(--right); }
.note { font-size: 14px; margin: 8px 0 26px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 18px 24px; margin: 0;
     padding-top: 24px; border-top: 1px solid var(--line); }
dt { font-size: 13px; color: var(--soft); } dd { margin: 0; font-weight: 550; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 36px 32px; }
.plot.wide { grid-column: 1 / -1; } .plot svg { display: block; width: 100%; height: auto; }
.plot svg text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important; }
.missing { color: var(--soft); border: 1px dashed var(--line); border-radius: 8px; padding: 40px; text-align: center; }
img, .gone { display: block; object-fit: cover; border-radius: 5px; background: #eef0f3; }
img.tiny { image-rendering: pixelated; }
.strips { display: grid; gap: 18px; } .strip { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
.strip figcaption { order: -1; flex: 0 0 110px; } small { display: block; font-size: 12px; color: var(--soft); }
.query { display: flex; gap: 28px; align-items: center; padding: 20px 0; border-top: 1px solid var(--line); }
.query > figure { flex: 0 0 124px; }
.query > figure figcaption { color: var(--ink); font-weight: 600; margin-top: 6px; }
.stage { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-start; } .stage + .stage { margin-top: 12px; }
.stage > span { flex: 0 0 52px; font-size: 13px; color: var(--soft); padding-top: 30px; }
.stage figure { width: 86px; } .stage img { border: 3px solid #ccd1d8; }
.stage figcaption { font-size: 12px; line-height: 1.3; padding: 3px 2px 0; white-space: nowrap; }
.stage figcaption span { display: block; overflow: hidden; text-overflow: ellipsis; }
.stage .right img { border-color: var(--right); } .stage .wrong img { border-color: var(--wrong); }
.right figcaption, span.right { color: var(--right); } .wrong figcaption, span.wrong { color: var(--wrong); }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
th, td { text-align: left; vertical-align: top; padding: 6px 16px 6px 0; border-top: 1px solid var(--line); }
td:nth-child(-n+2) { white-space: nowrap; } tr.resume td:nth-child(3) { font-weight: 600; }
@media (max-width: 760px) {
  .plots { grid-template-columns: 1fr; } .query { flex-direction: column; align-items: flex-start; }
  header, section { padding: 22px; }
}
@media print { body { background: #fff; } section, header { border: 0; break-inside: avoid; } }
"""
