"""What a report shows, gathered as plain data for its template (report.html.j2).

Made from metrics.jsonl, config.yaml and gallery/ of the run directory, whichever of them exist, at any time of a run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from seer_scale import __version__
from seer_scale.config import load_recipe
from seer_scale.files import shown, write_whole
from seer_scale.formatting import counted, duration, rate, short_number, untrained_with
from seer_scale.observe.records import START_EVENTS, compare, read_metrics
from seer_scale.observe.report.evaluations import plots_of, read_results, rows_of
from seer_scale.observe.report.figures import Figures, climb, latest, majority, memory_title, newest_start, plots_of_run
from seer_scale.observe.report.pictures import Pictures, hits
from seer_scale.observe.report.plots import Rows, is_number
from seer_scale.observe.time_account import CATEGORIES, TimeAccount, read_time_account

MAX_EVENTS = 40


@dataclass(frozen=True)
class Measured:
    """A kNN top-1, such as "31.2 % ± 1.5", and when it was measured, such as "before"."""

    percent: str
    when: str


@dataclass(frozen=True)
class Headline:
    """What is known of kNN top-1. incomparable: the figure before training, where it was measured otherwise."""

    figures: list[Measured]
    incomparable: str = ""

    def __str__(self) -> str:
        known = ", ".join(f"{figure.percent} {figure.when}" for figure in self.figures)
        other = f" (what stood before, {self.incomparable}, was measured with other images or keys)"
        return f"kNN top-1: {known}{other * bool(self.incomparable)}"


def headline(rows: Rows) -> Headline | None:
    """`kNN top-1: A % before, B % after`, or what of it is known; None without an evaluation. What was measured before
    the last row, or was not meant to be the last, is said to be `at N samples`."""
    known = [r for r in rows if is_number(r.get("knn/top1"))]
    if not known:
        return None
    before = [Measured(_percent(r), "before") for r in known[:1] if r["samples_seen"] == 0]
    after = [Measured(_percent(r), _when(r, rows)) for r in known[-1:] if r["samples_seen"] > 0]
    if before and after and not compare(known[0], known[-1]):
        return Headline(after, before[0].percent)
    return Headline(before + after)


def _when(row: dict[str, Any], rows: Rows) -> str:
    seen = row["samples_seen"]
    is_end = row.get("evaluation/stage", "after") == "after" and seen == rows[-1]["samples_seen"]
    return "after" if is_end else f"at {counted(seen, 'sample')}"


def _percent(row: dict[str, Any]) -> str:
    error = row.get("knn/top1_stderr")
    return f"{row['knn/top1']:.1f} %" + (f" ± {error:.1f}" if is_number(error) else "")


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html, published by rename, and return its path."""
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    write_page(path, "report.html.j2", _data(run_dir))
    return path


def write_page(path: Path, template: str, data: dict[str, Any]) -> None:
    """A template of this folder, filled in, published by rename. data: without the style sheet and the date."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup(resources.files(__package__).joinpath("style.css").read_text())
    page = environment.get_template(template).render(data, style=style, written=time.strftime("%Y-%m-%d %H:%M"))
    write_whole(path, page.encode(errors="backslashreplace"))  # logs of old hold names as they were


def _data(run_dir: Path) -> dict[str, Any]:
    rows, events = read_metrics(run_dir)
    place = run_dir / "config.yaml"
    config = load_recipe(str(place)) if place.exists() else {}
    pictures, account = Pictures(run_dir), read_time_account(run_dir)
    restarts, queries = max(0, len(account.attempts) - 1), pictures.queries()
    known = [r for r in rows if is_number(r.get("knn/top1"))]
    draw = Figures(rows, events)
    results = read_results(run_dir)
    kept = _kept(events)
    return {
        "name": shown(run_dir.resolve().name),
        "folder": shown(run_dir.name),
        "headline": headline(rows),
        "is_better": len(known) > 1 and compare(known[0], known[-1]) and known[-1]["knn/top1"] > known[0]["knn/top1"],
        "is_unlabelled": not newest_start(events).get("labelled", True),
        "untrained_with": untrained_with(known[0].get("evaluation/statistics_images", 0)) if known else "",
        "has_error": any("knn/top1_stderr" in r for r in rows),
        "majority": majority(rows),
        "facts": _facts(rows, events, config, restarts),
        "has_breaks": bool(draw.breaks),
        "plots": plots_of_run(draw),
        "time": _time(account),
        "crops": pictures.crops(),
        "queries": queries,
        "hits": hits(queries),
        "prototypes": pictures.prototypes(),
        "has_anchors": bool(newest_start(events).get("anchors", "untold")),  # a method without them has no such section
        "use": pictures.use(),
        "patches": pictures.strips("patches"),
        "sections": _sections(draw, pictures),
        "results": [(r.task, r.figure, r.score, r.untrained, r.of, r.protocol) for r in rows_of(results)],
        "result_plots": plots_of(results),
        "versions": _versions(events, config),
        "recipe": place.read_text() if place.exists() else "",
        "restarts": restarts,
        "events": [(_clock(e), f"{e['samples_seen']:,}", str(e["event"]), str(e.get("text", ""))) for e in kept],
        "kinds": [str(e["event"]) for e in kept],
    }


# --- the head


def _facts(rows: Rows, events: Rows, config: dict[str, Any], restarts: int) -> dict[str, str]:
    """What a person asks first of a run, as far as it is known."""

    def get(key: str) -> Any:
        part, name = key.split(".")
        return (config.get(part) or {}).get(name)

    facts: dict[str, str] = {}
    begun = newest_start(events)
    steps = [r for r in rows if "step" in r]
    if get("model.name"):
        facts["Backbone"] = get("model.name")
    if is_number(begun.get("parameters")):
        facts["Parameters"] = f"{short_number(begun['parameters'])} with head"
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
        facts[memory_title(events)] = f"{max(peak):.2f} GiB a rank"
    facts["Restarts"] = str(restarts) if restarts else "none"
    return facts


def _wall_s(rows: Rows, events: Rows) -> float:
    """Seconds the run was running: from the first to the last sign of life of each process."""
    signs = sorted(
        (r["wall_time"], r.get("event") in START_EVENTS) for r in rows + events if is_number(r.get("wall_time"))
    )
    return sum(b - a for (a, _), (b, begins) in zip(signs, signs[1:]) if not begins)


# --- what the method brings, and time


def _sections(draw: Figures, pictures: Pictures) -> list[dict[str, Any]]:
    """ReportSections that the method brings."""
    return [
        {
            "title": section["title"],
            "note": section["note"],
            "plots": draw.of_method(section["plots"]),
            "strips": pictures.strips(section["pictures"], 112),
        }
        for section in latest(draw.events, "sections") or []
    ]


def _time(account: TimeAccount) -> dict[str, Any] | None:
    """How far the run was at each hour, and what its time went into."""
    if not account.attempts or account.total_s <= 0:
        return None
    mean = account.mean_time_to_recover_s
    return {
        "svg": climb(account),
        "recovered": duration(mean) if mean is not None else "",
        "spent": [
            (words, duration(account.seconds[name]), f"{100 * account.seconds[name] / account.total_s:.1f} %")
            for name, words in CATEGORIES.items()
            if account.seconds[name] > 0
        ],
        "attempts": [
            (
                time.strftime("%F %T", time.localtime(attempt.began)),
                attempt.on,
                f"{attempt.seen[0]:,} to {attempt.seen[1]:,}",
                duration(attempt.ended - attempt.began),
                duration(attempt.lost_s),
                attempt.cause,
            )
            for attempt in account.attempts
        ],
    }


# --- how to make it again, and what happened


def _versions(events: Rows, config: dict[str, Any]) -> dict[str, str]:
    """The command, the versions and the machine of the newest start, and the seed."""
    begun, seed = newest_start(events), (config.get("run") or {}).get("seed")
    started = {"started by": str(begun["command"])} if begun.get("command") else {}
    versions = {str(k): str(v) for k, v in (begun.get("versions") or {}).items()}
    return started | {"seer_scale": __version__} | versions | ({} if seed is None else {"seed": str(seed)})


def _kept(events: Rows) -> Sequence[dict[str, Any]]:
    """All restarts, the first of the other events and the last of them."""
    rest = [e for e in events if e["event"] != "resume"]
    others = [id(e) for e in rest[:1] + rest[-MAX_EVENTS:]]
    return [e for e in events if e["event"] == "resume" or id(e) in others]


def _clock(event: dict[str, Any]) -> str:
    at = event.get("wall_time")
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if is_number(at) else ""
